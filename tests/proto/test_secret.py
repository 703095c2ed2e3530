from __future__ import annotations

import pytest

from proto.errors import UsageError
from proto.secret import MAX_SECRET_BYTES, MIN_SECRET_BYTES, read_secret_file


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    return path


def test_a_secret_is_read_without_the_white_space_around_it(secret_file):
    secret_file.write_bytes(b"  correct horse battery\n")
    assert read_secret_file(secret_file) == b"correct horse battery"
    assert read_secret_file(str(secret_file)) == b"correct horse battery"


def test_a_missing_file_is_named_with_the_way_to_make_one(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path}/none: no such file.*head -c 32 /dev/urandom"):
        read_secret_file(tmp_path / "none")


def test_a_folder_is_no_secret_file(tmp_path):
    with pytest.raises(UsageError, match=f"cannot read the secret file {tmp_path}"):
        read_secret_file(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o610])
def test_a_file_that_others_can_open_is_refused_with_its_mode(secret_file, mode):
    secret_file.write_bytes(b"x" * 32)
    secret_file.chmod(mode)
    with pytest.raises(UsageError, match=f"mode 0{mode:o}.*chmod 600 {secret_file}"):
        read_secret_file(secret_file)


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * (MIN_SECRET_BYTES - 1) + b"\n"])
def test_a_short_secret_is_refused_with_its_length(secret_file, content):
    secret_file.write_bytes(content)
    with pytest.raises(UsageError, match=f"holds {len(content.strip())} bytes.* at least 16"):
        read_secret_file(secret_file)


def test_a_file_that_is_far_too_long_is_not_read_to_its_end(secret_file):
    secret_file.write_bytes(b"x" * (MAX_SECRET_BYTES + 1))
    with pytest.raises(UsageError, match="more than 4096 bytes"):
        read_secret_file(secret_file)
