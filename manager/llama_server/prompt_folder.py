"""A folder that says what to ask: user_prompt(.txt), and system_prompt(.txt) if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from manager.encoding import Message
from proto.errors import UsageError

USER: Final = "user_prompt"
SYSTEM: Final = "system_prompt"
SUFFIXES: Final = ("", ".txt")


def read_prompt_folder(folder: Path) -> tuple[Message, ...]:
    """The conversation that the files of the folder make.

    Raises:
        UsageError: there is no user prompt, one is there twice, is empty, or is not UTF-8.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"prompt_dir {folder} {what}: name the folder that has {USER}.txt.")
    user, system = _read(folder, USER), _read(folder, SYSTEM)
    if user is None:
        raise UsageError(
            f"prompt_dir {folder} has neither {USER} nor {USER}.txt: write what to ask there."
        )
    return conversation(user, system)


def conversation(user: str, system: str | None) -> tuple[Message, ...]:
    """What the user says, after what the model is told first."""
    first: tuple[Message, ...] = ()
    if system is not None:
        first = ({"role": "system", "content": system},)
    return (*first, {"role": "user", "content": user})


def _read(folder: Path, stem: str) -> str | None:
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
    if not found:
        return None
    if len(found) > 1:
        raise UsageError(
            f"prompt_dir {folder} has both {stem} and {stem}.txt: remove the one that is not meant."
        )
    path = found[0]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 (byte {exc.start}): save it as UTF-8.") from None
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}.") from exc
    if not text.strip():
        raise UsageError(f"{path} is empty: write the prompt there, or remove the file.")
    # What editors put at the end is not part of the prompt.
    return text.removesuffix("\n").removesuffix("\r")
