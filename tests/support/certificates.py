"""Certificates for tests, made once a process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from manager.certificates import make_certificates
from proto.tls import Tls, TlsFiles, read_tls


@cache
def folder_of(name: str = "ours", *hosts: str) -> Path:
    """An authority of its own, with certificates for `hosts` (by default, one)."""
    folder = Path(tempfile.mkdtemp(prefix=f"comboio-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_certificates(folder, hosts or ("here.lan",), days=2)
    return folder


def files_of(folder: Path, host: str = "here.lan") -> TlsFiles:
    """What a program of that host is given."""
    return TlsFiles(cert=folder / f"{host}.pem", key=folder / f"{host}.key", ca=folder / "ca.pem")


@cache
def tls_of_here() -> Tls:
    """Of a host that is this machine."""
    return read_tls(files_of(folder_of()))
