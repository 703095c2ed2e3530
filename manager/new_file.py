"""Write a file that is not there yet, with the rights that it is to have from its first byte on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o600  # its owner's alone


def write_new(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Make the file and write it.

    Raises:
        FileExistsError: there is one of that name, which is left as it is.
        OSError: it cannot be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
