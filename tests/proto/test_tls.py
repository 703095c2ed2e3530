"""Links with certificates: who is let in, and what both sides are told when one is not."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import ssl

import pytest

from manager import certificates
from proto.errors import AuthenticationFailed, Error, PeerLost, UsageError, WorkerRefused
from proto.framing import FrameReader, encode_frame
from proto.link import LinkSettings
from proto.messages import StatusRequest
from proto.tls import Tls, TlsFiles, read_tls, tls_files
from proto.tls_transport import HANDSHAKE_BYTES
from tests.proto.sockets import as_manager, listening, soon
from tests.proto.wire_examples import HELLO, WELCOME
from tests.support.certificates import files_of, folder_of, tls_of_here

SECRET = b"correct horse battery staple"


def strangers() -> Tls:
    return read_tls(files_of(folder_of("theirs")))


def tls_with(folder, host="odd.lan", days=2, names=None) -> Tls:
    """Of a certificate that our authority has signed in an odd way, kept in `folder`."""
    ours = folder_of()
    ca, ca_key, _ = certificates._authority(ours, days=2)
    of_itself, certificates.OF_ITSELF = certificates.OF_ITSELF, names or certificates.OF_ITSELF
    try:
        certificate, key = certificates._sign(host, ca, ca_key, days)
    finally:
        certificates.OF_ITSELF = of_itself
    cert_path, key_path = folder / "odd.pem", folder / "odd.key"
    certificates._write(cert_path, certificates._certificate_bytes(certificate), 0o644)
    certificates._write(key_path, certificates._key_bytes(key), 0o600)
    return read_tls(TlsFiles(cert=cert_path, key=key_path, ca=ours / "ca.pem"))


# --- links -------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET], ids=["certificates", "and-secret"])
async def test_a_link_with_certificates_opens_speaks_tls_1_3_and_closes(secret):
    async with listening(tls_of_here(), secret=secret) as (listener, links, refused):
        link = await as_manager(listener.address, tls=tls_of_here(), secret=secret)
        accepted = await soon(links.get())
        assert link._transport._layer._tls.version() == "TLSv1.3"
        link.send(StatusRequest())
        assert (await soon(accepted.receive())).message == StatusRequest()
        await soon(link.close("enough"))
        await soon(accepted.wait_closed())
        assert accepted.goodbye == "enough"
        assert refused.empty()


async def test_with_certificates_a_wrong_secret_is_still_refused_on_both_sides():
    async with listening(tls_of_here(), secret=SECRET) as (listener, _, refused):
        with pytest.raises(WorkerRefused, match="pass the same --secret-file to both"):
            await as_manager(listener.address, tls=tls_of_here(), secret=b"x" * 16)
        assert isinstance(await soon(refused.get()), AuthenticationFailed)


async def test_what_crosses_a_link_with_certificates_cannot_be_read():
    """A relay between the two sees all that is sent, and no word of it."""
    seen = bytearray()

    async def relay(reader, writer):
        host, port = listener.address.rsplit(":", 1)
        down, up = await asyncio.open_connection(host, int(port))

        async def copy(source, sink):
            while data := await source.read(4096):
                seen.extend(data)
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, up), copy(down, writer))

    async with listening(tls_of_here()) as (listener, _, _):
        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = await as_manager(f"127.0.0.1:{port}", tls=tls_of_here())
        await soon(link.close("a goodbye that nobody else reads"))
        server.close()
    assert len(seen) > 1000
    assert b"CMBO" not in seen
    assert b"nobody else" not in seen


# --- refusals ----------------------------------------------------------------------------------


async def refusal_of(theirs, ours, host="127.0.0.1"):
    """The sentences that the opener and the listener get."""
    async with listening(theirs) as (listener, links, refused):
        port = listener.address.rsplit(":", 1)[1]
        with pytest.raises(Error) as caught:
            await as_manager(f"{host}:{port}", tls=ours)
        at_door = await soon(refused.get())
        assert links.empty()
    return str(caught.value), str(at_door)


async def test_a_certificate_of_another_authority_is_refused_on_both_sides():
    opener, listener = await refusal_of(tls_of_here(), strangers())
    assert "the other side's certificate is not signed by the authority of --tls-ca" in opener
    assert "refused this side's certificate" in listener
    assert "not signed by the authority of that side" in listener


async def test_an_opener_of_another_authority_is_refused_on_both_sides():
    """It trusts the worker; the worker does not trust it."""
    ours, theirs = folder_of(), files_of(folder_of("theirs"))
    mixed = dataclasses.replace(theirs, ca=ours / "ca.pem")
    opener, listener = await refusal_of(tls_of_here(), read_tls(mixed))
    assert "refused this side's certificate (--tls-cert): it is not signed by the" in opener
    assert "the other side's certificate is not signed by the authority of --tls-ca" in listener


async def test_an_opener_without_a_certificate_is_refused_on_both_sides():
    bare = ssl.create_default_context(cafile=folder_of() / "ca.pem")
    opener, listener = await refusal_of(tls_of_here(), Tls(bare, bare))
    assert "refused this side's certificate (--tls-cert): none was sent" in opener
    assert "the other side showed no certificate" in listener


async def test_an_expired_certificate_is_refused_on_both_sides(tmp_path):
    expired = tls_with(tmp_path, days=0)
    opener, listener = await refusal_of(expired, tls_of_here())
    assert "the other side's certificate has expired" in opener
    assert "refused this side's certificate (--tls-cert): it has expired" in listener
    opener, listener = await refusal_of(tls_of_here(), expired)
    assert "refused this side's certificate (--tls-cert): it has expired" in opener
    assert "the other side's certificate has expired" in listener


async def test_a_worker_whose_certificate_has_another_name_is_not_called(tmp_path):
    other = tls_with(tmp_path, names=("192.0.2.7",))
    opener, listener = await refusal_of(other, tls_of_here())
    assert "the other side's certificate is not for 127.0.0.1: dial one of the names" in opener
    assert "refused this side's certificate" in listener
    opener, _ = await refusal_of(other, tls_of_here(), host="localhost")
    assert "is not for localhost" in opener


async def test_tls_on_the_managers_side_only_is_one_sentence_on_both_sides():
    opener, listener = await refusal_of(None, tls_of_here())
    assert "the other side does not speak TLS: leave out --tls-cert" in opener
    assert "the other side speaks TLS and this side does not" in listener


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])
async def test_tls_on_the_workers_side_only_is_one_sentence_on_both_sides(secret):
    async with listening(tls_of_here(), secret=secret) as (listener, _, refused):
        with pytest.raises(WorkerRefused, match=r"this worker speaks TLS: pass --tls-cert, --tls"):
            await as_manager(listener.address, secret=secret)
        assert "this worker speaks TLS" in str(await soon(refused.get()))


async def test_an_older_tls_is_refused():
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    opener, listener = await refusal_of(tls_of_here(), Tls(old, old))
    assert "does not speak TLS 1.3" in opener
    assert "does not speak TLS 1.3" in listener


# --- strangers ---------------------------------------------------------------------------------


async def test_a_stranger_that_says_nothing_or_half_a_hello_is_cut_in_time():
    settings = LinkSettings(handshake_timeout_s=0.1)
    async with listening(tls_of_here(), settings=settings) as (listener, _, refused):
        host, port = listener.address.rsplit(":", 1)
        for start in (b"", b"\x16\x03\x01\x02\x00\x01"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(start)
            assert await soon(reader.read()) == b""
            writer.close()
            assert "did not finish the handshake within 0.1 s" in str(await soon(refused.get()))
        assert listener.unproven == 0


async def test_a_stranger_cannot_make_a_handshake_longer_than_its_bound():
    """Records of a handshake message that is announced as very long, and never ends."""
    async with listening(tls_of_here()) as (listener, _, refused):
        host, port = listener.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        part = b"\x01" + (60_000).to_bytes(3, "big") + bytes(4000)
        record = b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part
        writer.write(record * (HANDSHAKE_BYTES // len(record) + 1))
        await soon(reader.read())
        writer.close()
        assert str(await soon(refused.get()))
        assert not listener.links
        assert not listener.unproven


async def test_only_so_many_strangers_may_be_in_their_handshake():
    async with listening(tls_of_here(), max_unproven=2) as (listener, _, refused):
        host, port = listener.address.rsplit(":", 1)
        waiting = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        while listener.unproven < 2:
            await soon(asyncio.sleep(0))
        with pytest.raises(PeerLost):
            await as_manager(listener.address, tls=tls_of_here())
        assert "too many links" in str(await soon(refused.get()))
        for _, writer in waiting:
            writer.close()
        while listener.unproven:
            await soon(asyncio.sleep(0))
        await (await as_manager(listener.address, tls=tls_of_here())).close()


async def test_a_record_that_was_changed_on_its_way_ends_the_link():
    async with listening(tls_of_here()) as (listener, links, _):
        host, port = listener.address.rsplit(":", 1)
        _, writer = await asyncio.open_connection(
            host, int(port), ssl=tls_of_here().opener, server_hostname="127.0.0.1"
        )
        writer.write(b"".join(encode_frame(HELLO)))
        link = await soon(links.get())
        raw = writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as sock:
            sock.setblocking(True)
            sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        await soon(link.wait_closed())
        assert "TLS failed" in str(link.error)
        writer.transport.abort()


async def test_an_end_of_tls_without_a_goodbye_is_a_lost_peer():
    async with listening(tls_of_here()) as (listener, links, _):
        host, port = listener.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=tls_of_here().opener, server_hostname="127.0.0.1"
        )
        writer.write(b"".join(encode_frame(HELLO)))
        [welcome, *_] = FrameReader().receive(await soon(reader.read(4096)))
        assert welcome.message == WELCOME
        link = await soon(links.get())
        writer.close()
        await soon(link.wait_closed())
        assert "without a goodbye" in str(link.error)


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for path in folder_of().iterdir():
        shutil.copy(path, tmp_path)
    return files_of(tmp_path)


def refusal_to_read(files) -> str:
    with pytest.raises(UsageError) as caught:
        read_tls(files)
    return str(caught.value)


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_a_file_that_is_missing_is_named(files, name):
    path = getattr(files, name)
    path.unlink()
    sentence = refusal_to_read(files)
    assert f"{path}: no such file or directory; make a set with `manager tls new" in sentence


def test_a_key_that_others_can_read_is_refused(files):
    files.key.chmod(0o640)
    assert refusal_to_read(files) == (
        f"the TLS key {files.key} can be read or written by others (mode 0640): "
        f"run `chmod 600 {files.key}`"
    )


def test_a_key_of_another_certificate_is_refused(files):
    other = files_of(folder_of("theirs")).key
    sentence = refusal_to_read(dataclasses.replace(files, key=other))
    assert f"the TLS key {other} does not belong to the certificate {files.cert}" in sentence


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_a_file_that_is_no_pem_is_refused_by_name(files, name):
    path = getattr(files, name)
    path.write_bytes(b"this is no certificate\n")
    assert str(path) in refusal_to_read(files)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(files):
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"password")
        )
    )
    assert f"the TLS key {files.key} is encrypted with a password" in refusal_to_read(files)


def test_one_of_the_three_options_needs_the_others(files):
    assert tls_files(None, None, None) is None
    with pytest.raises(UsageError, match="--tls-cert and --tls-ca without --tls-key: a link with"):
        tls_files(files.cert, None, files.ca)
