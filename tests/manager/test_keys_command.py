"""`manager secret new` and `manager tls new`: what they write, and what they leave alone."""

from __future__ import annotations

import stat

import pytest
from click.testing import CliRunner

from manager.keys_command import new_certificates, new_secret
from proto.errors import UsageError
from proto.secret import read_secret_file
from proto.tls import read_tls
from tests.support.certificates import files_of


def run(command, *args):
    """What it printed; its errors come through as they are."""
    done = CliRunner().invoke(command, list(map(str, args)), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_secret_is_one_that_links_take_and_no_two_are_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(new_secret, one)
    run(new_secret, two)
    assert mode(one) == 0o600
    assert len(read_secret_file(one)) >= 43
    assert read_secret_file(one) != read_secret_file(two)


def test_a_secret_that_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "secret"
    path.write_text("the old one")
    with pytest.raises(UsageError, match=f"{path} is there already"):
        run(new_secret, path)
    assert path.read_text() == "the old one"


def test_a_secret_in_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="no such file or directory"):
        run(new_secret, tmp_path / "none" / "secret")


def test_new_certificates_are_ones_that_links_take(tmp_path):
    folder = tmp_path / "tls"
    printed = run(new_certificates, folder, "--hosts", "192.168.1.21,board-2.lan,fe80::1")
    for host in ("192.168.1.21", "board-2.lan", "fe80__1"):
        files = files_of(folder, host)
        assert str(files.cert) in printed
        assert mode(files.key) == 0o600
        read_tls(files)
    assert mode(folder / "ca.key") == 0o600


def test_the_same_authority_signs_for_hosts_that_come_later(tmp_path):
    run(new_certificates, tmp_path, "--hosts", "one")
    ca = (tmp_path / "ca.pem").read_bytes()
    run(new_certificates, tmp_path, "--hosts", "two")
    assert (tmp_path / "ca.pem").read_bytes() == ca
    read_tls(files_of(tmp_path, "two"))


def test_a_certificate_that_is_there_is_not_overwritten(tmp_path):
    run(new_certificates, tmp_path, "--hosts", "one")
    before = (tmp_path / "one.pem").read_bytes()
    with pytest.raises(UsageError, match=r"one\.pem is there already"):
        run(new_certificates, tmp_path, "--hosts", "two,one")
    assert (tmp_path / "one.pem").read_bytes() == before
    assert not (tmp_path / "two.pem").exists()


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        (",", "names no host"),
        ("a,b,a", "names a twice"),
        ("board:7710", "'board:7710' is no host's name or IP address; ports are left out"),
        ("../up", "is no host's name"),
        ("ca", "is no host's name"),
    ],
)
def test_a_host_that_cannot_be_one_is_refused(tmp_path, hosts, sentence):
    with pytest.raises(UsageError, match=sentence):
        run(new_certificates, tmp_path / "tls", "--hosts", hosts)
    assert not (tmp_path / "tls").exists()
