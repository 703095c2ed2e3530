"""Read the secret that both ends of a link share. The only file that a link ever reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from proto.errors import UsageError

MIN_SECRET_BYTES: Final = 16
MAX_SECRET_BYTES: Final = 4096


def read_secret_file(path: str | os.PathLike[str]) -> bytes:
    """The secret in `path`, without the white space around it.

    Raises:
        UsageError: missing, not a file, readable by others, too short or too long.
    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            secret = file.read(MAX_SECRET_BYTES + 1)
    except OSError as exc:
        raise UsageError(
            f"cannot read the secret file {path}: {(exc.strerror or str(exc)).lower()}; "
            "make one with "
            f"`(umask 077; head -c 32 /dev/urandom | base64 > {path})`"
        ) from exc
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UsageError(
            f"the secret file {path} can be read or written by others "
            f"(mode {stat.S_IMODE(status.st_mode):04o}): run `chmod 600 {path}`"
        )
    if len(secret) > MAX_SECRET_BYTES:
        raise UsageError(
            f"the secret file {path} holds more than {MAX_SECRET_BYTES} bytes: is it the right one?"
        )
    secret = secret.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise UsageError(
            f"the secret file {path} holds {len(secret)} bytes, a secret needs at least "
            f"{MIN_SECRET_BYTES}: make one with `head -c 32 /dev/urandom | base64`"
        )
    return secret
