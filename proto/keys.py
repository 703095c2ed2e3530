"""What a program shows at the other end of a link, and asks to be shown. Reads files through
`proto.secret` and `proto.tls`; knows no link."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from proto.secret import read_secret_file
from proto.tls import Tls, TlsFiles, read_tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A secret, certificates, both, or neither."""

    secret: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __bool__(self) -> bool:
        """Whether a stranger is told from a friend."""
        return self.secret is not None or self.tls is not None


NO_KEYS: Final = Keys()


def read_keys(secret_file: str | Path | None, tls: TlsFiles | None = None) -> Keys:
    """Read what the options name.

    Raises:
        UsageError: a file is missing, readable by others, or not what it should be.
    """
    return Keys(
        secret=None if secret_file is None else read_secret_file(secret_file),
        tls=None if tls is None else read_tls(tls),
    )
