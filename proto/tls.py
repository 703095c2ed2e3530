"""Certificates for links: files become what a link shows and asks for, failures become sentences.

TLS 1.3 and nothing older, and both sides show a certificate that the same authority has signed. An
opener also checks that the address it dialled is among the names in the worker's certificate. Knows
no socket: what happens to the bytes stands in `proto.tls_transport`.
"""

from __future__ import annotations

import os
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proto.errors import AuthenticationFailed, RemoteProtocolError, UsageError

MAX_FILE_BYTES: Final = 1024 * 1024

SPEAKS_NO_TLS: Final = (
    "the other side does not speak TLS: leave out --tls-cert, --tls-key and --tls-ca, or start it "
    "with them"
)
WANTS_TLS: Final = (
    "this worker speaks TLS: pass --tls-cert, --tls-key and --tls-ca with certificates of its "
    "authority (`manager tls new` makes some)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where one side's certificate, its private key and the authority of both are, in PEM."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Tls:
    """What a link is made with, at either end."""

    opener: ssl.SSLContext
    listener: ssl.SSLContext


def tls_files(cert: Path | None, key: Path | None, ca: Path | None) -> TlsFiles | None:
    """The three options as one value; None where none was given.

    Raises:
        UsageError: some are given and some are not.
    """
    given = {"--tls-cert": cert, "--tls-key": key, "--tls-ca": ca}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if cert is None or key is None or ca is None:
        here = [name for name in given if name not in missing]
        raise UsageError(
            f"{' and '.join(here)} without {' and '.join(missing)}: a link with TLS needs all three"
        )
    return TlsFiles(cert=cert, key=key, ca=ca)


def read_tls(files: TlsFiles) -> Tls:
    """Read the files.

    Raises:
        UsageError: one is missing, is not what it should be, or the key is readable by others.
    """
    _mode_of(files.cert, "certificate")  # anybody may read it
    _mode_of(files.ca, "authority's certificate")
    key_mode = _mode_of(files.key, "key")
    if key_mode & 0o077:
        raise UsageError(
            f"the TLS key {files.key} can be read or written by others (mode {key_mode:04o}): "
            f"run `chmod 600 {files.key}`"
        )
    opener = _context(files, ssl.PROTOCOL_TLS_CLIENT)
    opener.check_hostname = True
    listener = _context(files, ssl.PROTOCOL_TLS_SERVER)
    listener.num_tickets = 0  # links last; nothing is resumed
    return Tls(opener, listener)


def _mode_of(path: Path, what: str) -> int:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            file.read(1)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise UsageError(
            f"cannot read the TLS {what} {path}: {reason}; make a set with "
            "`manager tls new DIR --hosts HOST,...`"
        ) from exc
    if status.st_size > MAX_FILE_BYTES:
        raise UsageError(
            f"the TLS {what} {path} holds {status.st_size} bytes: is it the right one?"
        )
    return stat.S_IMODE(status.st_mode)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(files.ca)
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(
            f"the TLS authority's certificate {files.ca} holds no certificate in PEM: pass the "
            "ca.pem of `manager tls new`"
        ) from exc
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"the TLS key {files.key} does not belong to the certificate {files.cert}: pass "
                "the two that were made together"
            ) from exc
        raise UsageError(
            f"the TLS certificate {files.cert} or its key {files.key} is not one in PEM, or is "
            f"too weak ({_words(exc)})"
        ) from exc
    except _Encrypted as exc:
        raise UsageError(
            f"the TLS key {files.key} is encrypted with a password, and nobody is here to type "
            "it: keep the key plain in a file that only you can read"
        ) from exc
    return context


class _Encrypted(Exception):
    """OpenSSL asks for a password."""


def _no_password() -> str:
    raise _Encrypted


# --- what goes wrong in a handshake ------------------------------------------------------------

# X509_V_ERR_*, by number.
_EXPIRED, _NOT_YET = 10, 9
_UNKNOWN_SIGNER: Final = {2, 18, 19, 20, 21}
_WRONG_NAME: Final = {62, 64}

# What the peer's alert says of our certificate.
_ALERTS: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "it is not signed by the authority of that side (its --tls-ca)",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is not one for the address that was dialled, or is damaged",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it could not be verified",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is not one for this use",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "none was sent",
    "TLSV1_ALERT_DECRYPT_ERROR": "its signature is wrong",
}
_VERSIONS: Final = {"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_SHARED_CIPHER"}


def explain(exc: ssl.SSLError, host: str | None) -> AuthenticationFailed | RemoteProtocolError:
    """What OpenSSL found, as one sentence.

    Args:
        host: that an opener dialled; None for a listener.
    """
    if isinstance(exc, ssl.SSLCertVerificationError):
        return AuthenticationFailed(_why_not_verified(exc, host))
    reason = exc.reason or ""
    if reason in _ALERTS:
        return AuthenticationFailed(
            f"the other side refused this side's certificate (--tls-cert): {_ALERTS[reason]}"
        )
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return AuthenticationFailed(
            "the other side showed no certificate: start it with --tls-cert, --tls-key and --tls-ca"
        )
    if reason in _VERSIONS:
        return RemoteProtocolError("the other side does not speak TLS 1.3, which links need")
    return RemoteProtocolError(f"TLS failed: {_words(exc)}")


def _why_not_verified(exc: ssl.SSLCertVerificationError, host: str | None) -> str:
    whose = "the other side's certificate"
    if exc.verify_code == _EXPIRED:
        return f"{whose} has expired: make it a new one (`manager tls new`), or set the clock"
    if exc.verify_code == _NOT_YET:
        return f"{whose} is not valid yet: set the clocks of the two machines"
    if exc.verify_code in _UNKNOWN_SIGNER:
        return (
            f"{whose} is not signed by the authority of --tls-ca: use certificates that one "
            "`manager tls new` has made on both sides"
        )
    if exc.verify_code in _WRONG_NAME and host is not None:
        return (
            f"{whose} is not for {host}: dial one of the names in it, or make one with "
            f"`manager tls new DIR --hosts {host}`"
        )
    return f"{whose} cannot be verified ({exc.verify_message})"


def _words(exc: ssl.SSLError) -> str:
    return (exc.reason or str(exc)).replace("_", " ").lower()
