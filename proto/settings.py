"""Settings from `COMBOIO_*` variables and `comboio.toml`, for every command line.

Knows where a setting may stand and which place wins: an option on the command line, then the
environment, then the file, then the default. Pure but for the functions that look at a file:
the environment comes in as a mapping. Knows no setting by name; each command line says which keys
are its own, gives what it gets back to click as `default_map`, and names `Setting.origin` when a
value is bad:

    file = read_settings_file(settings_file(os.environ))
    found = find_settings("worker", known_keys, file=file, environ=os.environ)
    context.default_map = {key: setting.value for key, setting in found.items()}

The file has one table a program, and may spell keys with `_` or `-`:

    [worker]
    listen = "0.0.0.0:7710"
    secret-file = "/etc/comboio/secret"

    [manager]
    workers = "10.0.0.2:7710,10.0.0.3:7710"

`[slurm]` says what is peculiar to a cluster, and has tables of its own, one a profile; it is
`manager.slurm.site` that reads it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from proto.errors import UsageError

TABLES: Final = ("worker", "manager", "slurm")
FILE_NAME: Final = "comboio.toml"
ENV_PREFIX: Final = "COMBOIO_"
FILE_VARIABLE: Final = "COMBOIO_CONFIG"  # path of another file than ./comboio.toml
NO_FILE: Final = "/dev/null"

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

Tables = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that did not come from the command line, and where it stands."""

    value: object  # str from the environment; str, int, float, bool or a list from the file
    origin: str  # for sentences: "COMBOIO_LISTEN" or "listen in [worker] of ./comboio.toml"


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """What a settings file says, table by table; empty when there is none."""

    path: Path
    tables: Tables


def settings_file(environ: Mapping[str, str]) -> Path | None:
    """The file to read: what `COMBOIO_CONFIG` names, else ./comboio.toml, else None.

    The null device is a file that says nothing: with it, no ./comboio.toml is read either.

    Raises:
        UsageError: `COMBOIO_CONFIG` names a file that is not there.
    """
    named = environ.get(FILE_VARIABLE, "")
    if not named:
        return Path(FILE_NAME) if Path(FILE_NAME).is_file() else None
    if named == NO_FILE:
        return None
    if not Path(named).is_file():
        raise UsageError(f"{FILE_VARIABLE} names {named!r}, and there is no such file.")
    return Path(named)


def read_settings_file(path: Path | None) -> SettingsFile:
    """Read the tables of `path`; None reads as a file that says nothing.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has something else than our tables.
    """
    if path is None:
        return SettingsFile(Path(FILE_NAME), {})
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not valid TOML: {exc}.") from exc
    for name, table in content.items():
        if name not in TABLES or not isinstance(table, dict):
            wanted = " or ".join(f"[{table}]" for table in TABLES)
            raise UsageError(f"{path} says {name!r} at its top: keys belong under {wanted}.")
    return SettingsFile(path, content)


def find_settings(
    table: str, known: Collection[str], *, file: SettingsFile, environ: Mapping[str, str]
) -> dict[str, Setting]:
    """Merge the file's table and the environment; the environment wins.

    Args:
        table: "worker" or "manager".
        known: the keys that this command line has, spelled with `_`.
        file: from `read_settings_file`.
        environ: `COMBOIO_<KEY>` is looked up for each known key; empty counts as not set.
    Returns:
        key (with `_`) -> Setting, only for the keys that were set.
    Raises:
        UsageError: the file's table has a key that is not known, or twice the same one.
    """
    found: dict[str, Setting] = {}
    for spelled, value in file.tables.get(table, {}).items():
        key = spelled.replace("-", "_")
        origin = f"{spelled} in [{table}] of {file.path}"
        if key not in known:
            raise UsageError(_unknown(spelled, known, f"[{table}] of {file.path}"))
        if key in found:
            raise UsageError(f"[{table}] of {file.path} sets {key!r} twice, with _ and with -.")
        if isinstance(value, dict):
            raise UsageError(f"{origin} is a table; it takes a single value.")
        found[key] = Setting(value, origin)
    for key in known:
        variable = ENV_PREFIX + key.upper()
        if environ.get(variable):
            found[key] = Setting(environ[variable], variable)
    return found


def parse_byte_size(text: str) -> int:
    """Bytes in "512MB" (10^6), "1.5GiB" (2^30), "64k" or plain "1048576".

    Raises:
        ValueError: not a size, in one clause that names the text.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size; write for example 512MB, 1.5GiB, or bytes")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2].lower()])


def _unknown(key: str, known: Collection[str], where: str) -> str:
    near = get_close_matches(key.replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
    return f"unknown key {key!r} in {where}: {hint}"
