"""A small authority, and one certificate a host: `manager tls new`.

Each certificate serves at both ends of a link, since a worker both listens and dials. Knows what
`cryptography` makes of names, and how files are written that only their owner may read.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manager.new_file import PRIVATE, write_new
from proto.errors import UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA: Final = "ca"
EVERYBODYS: Final = 0o644  # to read
MAX_HOSTS: Final = 1024
MAX_HOST_CHARS: Final = 253
# Clocks of boards without a battery are late.
BACKDATED: Final = datetime.timedelta(days=1)
# What every machine calls itself; a certificate is for workers started there as well.
OF_ITSELF: Final = ("localhost", "127.0.0.1", "::1")


def parse_hosts(text: str) -> list[str]:
    """The hosts of `--hosts`, in their order.

    Raises:
        UsageError: none, one twice, too many, or one that cannot be a host's name.
    """
    hosts = [host.strip() for host in text.split(",") if host.strip()]
    if not hosts:
        raise UsageError("--hosts names no host: write it as 192.168.1.21,192.168.1.22,board3.lan")
    if len(hosts) > MAX_HOSTS:
        raise UsageError(f"--hosts names {len(hosts)} hosts: at most {MAX_HOSTS} are possible")
    for host in hosts:
        if hosts.count(host) > 1:
            raise UsageError(f"--hosts names {host} twice: each host gets one certificate")
        if not _is_host(host):
            raise UsageError(
                f"--hosts: {host!r} is no host's name or IP address; ports are left out"
            )
    return hosts


def _is_host(text: str) -> bool:
    if _ip(text) is not None:
        return True
    parts = text.split(".")
    return (
        len(text) <= MAX_HOST_CHARS
        and text != CA
        and text.isascii()
        and all(
            part and len(part) <= 63 and part.replace("-", "").isalnum() and part[0] != "-"
            for part in parts
        )
    )


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def make_certificates(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """Write `ca.pem`, `ca.key`, and for each host `HOST.pem` and `HOST.key`; returns them.

    An authority that is in the folder already signs the new certificates too.

    Raises:
        UsageError: `cryptography` is not installed, a file is there already, or cannot be written.
    """
    if days < 1:
        raise UsageError(f"--days {days}: a certificate is valid for at least 1 day")
    _check_installed()
    names = {host: _file_name(host) for host in hosts}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names.values():
            for path in (folder / f"{name}.pem", folder / f"{name}.key"):
                if path.exists():
                    raise UsageError(f"{path} is there already: remove it, or name another folder")
        ca, ca_key, written = _authority(folder, days)
        for host, name in names.items():
            certificate, key = _sign(host, ca, ca_key, days)
            written += [
                _write(folder / f"{name}.pem", _certificate_bytes(certificate), EVERYBODYS),
                _write(folder / f"{name}.key", _key_bytes(key)),
            ]
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise UsageError(f"cannot write certificates to {folder}: {reason}") from exc
    return written


def _check_installed() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as exc:
        raise UsageError(
            "manager tls new needs the package cryptography: run `pip install 'comboio[tls]'`"
        ) from exc


def _file_name(host: str) -> str:
    return host.replace(":", "_")


def _authority(
    folder: Path, days: int
) -> tuple[x509.Certificate, EllipticCurvePrivateKey, list[Path]]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    cert_path, key_path = folder / f"{CA}.pem", folder / f"{CA}.key"
    if cert_path.exists() != key_path.exists():
        here, gone = (cert_path, key_path) if cert_path.exists() else (key_path, cert_path)
        raise UsageError(f"{here} is there and {gone} is not: bring it back, or take a new folder")
    if cert_path.exists():
        try:
            ca = x509.load_pem_x509_certificate(cert_path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
        except (ValueError, TypeError) as exc:
            raise UsageError(
                f"{cert_path} and {key_path} are no authority of `manager tls new`: take a new "
                "folder"
            ) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
            raise UsageError(f"{key_path} does not belong to {cert_path}: take a new folder")
        return ca, key, []
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Comboio authority")
    ca = (
        _builder(days)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, _hash())
    )
    written = [
        _write(cert_path, _certificate_bytes(ca), EVERYBODYS),
        _write(key_path, _key_bytes(key)),
    ]
    return ca, key, written


def _sign(
    host: str, ca: x509.Certificate, ca_key: EllipticCurvePrivateKey, days: int
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(it) for it in dict.fromkeys((host, *OF_ITSELF))]
    both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(days)
        .subject_name(_name(host[:64]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, _hash())
    )
    return certificate, key


def _builder(days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    number = _ip(host)
    return x509.DNSName(host) if number is None else x509.IPAddress(number)


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _hash() -> hashes.SHA256:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def _certificate_bytes(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_bytes(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, mode: int = PRIVATE) -> Path:
    write_new(path, data, mode)
    return path
