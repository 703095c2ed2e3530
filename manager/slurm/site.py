"""What is peculiar to a cluster: partition, account, modules, environment, folders.

Comes from options, `COMBOIO_*` variables, and the `[slurm]` table of comboio.toml, which may hold
profiles, one a cluster or a way of using it:

    [slurm]
    account = "bio42"
    venv = "/scratch/bio42/venv"
    profile = "cpu"                      # used when --profile names no other

    [slurm.profiles.santos-dumont]
    partition = "sequana_gpu"
    gpus-per-node = 4
    modules = ["gcc/14", "cuda/12.6"]

Knows no script and no backend; submits nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from proto.errors import UsageError
from proto.settings import (
    ENV_PREFIX,
    Setting,
    SettingsFile,
    find_settings,
    read_settings_file,
    settings_file,
)

Command = TypeVar("Command", bound=Callable[..., Any])

TABLE: Final = "slurm"
JOBS_FOLDER: Final = "comboio-jobs"  # below the folder that a job is submitted from


class SiteOption(click.Option):
    """An option whose settings stand in `[slurm]`; `site_options` reads them."""

    settings_table = TABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How jobs are asked for here. None or empty: Slurm's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str | None = None
    mem: str | None = None
    gres: str | None = None
    gpus_per_node: str | None = None
    cpus_per_task: str | None = None
    sbatch_flags: tuple[str, ...] = ()  # as sbatch takes them, one word each
    modules: tuple[str, ...] = ()
    venv: Path | None = None
    conda_env: str | None = None  # name or folder
    jobs_folder: Path = Path(JOBS_FOLDER)

    def __post_init__(self) -> None:
        if self.venv is not None and self.conda_env is not None:
            raise UsageError(
                f"--venv {self.venv} and --conda-env {self.conda_env}: a job runs in one "
                "environment, pass one of them."
            )
        for flag in self.sbatch_flags:
            if not flag.startswith("-"):
                raise UsageError(
                    f"--sbatch-flag {flag!r} is no flag: write it as sbatch takes it, in one word, "
                    "as in --sbatch-flag=--exclusive or --sbatch-flag=--mail-type=END."
                )
        for module in self.modules:
            if not module or any(letter.isspace() for letter in module):
                raise UsageError(f"--module {module!r}: name one module, as in --module cuda/12.6.")

    def flags(self) -> list[str]:
        """What sbatch is told of it."""
        words = []
        for name in SBATCH_NAMES:
            value = getattr(self, name)
            if value is not None:
                words.append(f"--{name.replace('_', '-')}={value}")
        return [*words, *self.sbatch_flags]

    def environment(self) -> dict[str, str]:
        """What the sbatch scripts read: modules, and the environment that has `manager` in it."""
        found = {"COMBOIO_JOBS": str(self.jobs_folder.absolute())}
        if self.modules:
            found["COMBOIO_MODULES"] = " ".join(self.modules)
        if self.venv is not None:
            found["COMBOIO_VENV"] = str(self.venv.absolute())
        elif self.conda_env is not None:
            found["COMBOIO_CONDA_ENV"] = self.conda_env
        elif sys.prefix != sys.base_prefix:  # the one that is running now
            found["COMBOIO_VENV"] = sys.prefix
        elif (Path(sys.prefix) / "conda-meta").is_dir():
            found["COMBOIO_CONDA_ENV"] = sys.prefix
        return found


SBATCH_NAMES: Final = (
    "partition",
    "account",
    "qos",
    "constraint",
    "reservation",
    "time",
    "mem",
    "gres",
    "gpus_per_node",
    "cpus_per_task",
)
LISTS: Final = ("modules", "sbatch_flags")
ENVIRONMENTS: Final = ("venv", "conda_env")
KEYS: Final = frozenset(it.name for it in fields(Site))


def site_options(command: Command) -> Command:
    """Add `--profile` and an option for each field of `Site`; the command gets it as `site`."""

    @wraps(command)
    def with_site(*args: Any, **values: Any) -> Any:
        typed = {key: values.pop(key) for key in KEYS}
        site = resolve_site(typed, values.pop("profile"), environ=os.environ)
        return command(*args, site=site, **values)

    wrapped: Any = with_site
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def _option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    return click.option(*names, cls=SiteOption, **attributes)


OPTIONS: Final = (
    _option("--profile", metavar="NAME", help="A table [slurm.profiles.NAME] of comboio.toml."),
    _option("--partition", "-p", metavar="NAME", help="Where to run."),
    _option("--account", "-A", metavar="NAME", help="Whose hours are spent."),
    _option("--qos", metavar="NAME", help="Quality of service."),
    _option("--constraint", "-C", metavar="LIST", help="Features that nodes must have."),
    _option("--reservation", metavar="NAME", help="Run inside this reservation."),
    _option("--time", "-t", metavar="LIMIT", help="Time limit: 90 or 1:30:00 or 2-00:00:00."),
    _option("--mem", metavar="SIZE", help="Memory a node."),
    _option("--gres", metavar="LIST", help="Generic resources a node, as gpu:4."),
    _option("--gpus-per-node", metavar="N", help="GPUs a node."),
    _option("--cpus-per-task", metavar="N", help="CPUs a task."),
    _option(
        "--sbatch-flag",
        "sbatch_flags",
        multiple=True,
        metavar="FLAG",
        help="Any other flag of sbatch, in one word; may be repeated.",
    ),
    _option(
        "--module",
        "modules",
        multiple=True,
        metavar="NAME",
        help="`module load` this in the job; may be repeated.",
    ),
    _option(
        "--venv",
        "--venv-dir",
        metavar="DIR",
        help="Virtual environment of the job. Default: the one of this command.",
    ),
    _option("--conda-env", metavar="NAME|DIR", help="Or a conda environment."),
    _option(
        "--jobs-folder",
        metavar="DIR",
        help="Logs and job folders, on a file system that all nodes see. "
        f"Default: ./{JOBS_FOLDER}.",
    ),
)


def resolve_site(
    typed: Mapping[str, Any], profile: str | None, *, environ: Mapping[str, str]
) -> Site:
    """What was typed, else the environment, else the profile, else the table `[slurm]`.

    Raises:
        UsageError: an unknown profile or key, or a value that cannot be one.
    """
    file = read_settings_file(settings_file(environ))
    table = dict(file.tables.get(TABLE, {}))
    profiles = table.pop("profiles", {})
    default_profile = table.pop("profile", None)
    wanted = profile or environ.get(f"{ENV_PREFIX}PROFILE") or default_profile
    layers = [_settings(TABLE, table, file, {})]
    if wanted is not None:
        name = f"{TABLE}.profiles.{wanted}"
        layers.append(_settings(name, _profile(profiles, wanted, file), file, {}))
    layers.append(_settings(TABLE, {}, file, environ))
    values: dict[str, Any] = {}
    for layer in layers:
        _lay(values, {key: _value(key, setting) for key, setting in layer.items()})
    _lay(values, {key: _typed(key, value) for key, value in typed.items() if value})
    return Site(**values)


def _lay(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put a layer over the values; its environment replaces one of the other kind."""
    if not layer.keys().isdisjoint(ENVIRONMENTS):
        for key in ENVIRONMENTS:
            values.pop(key, None)
    values |= layer


def _profile(profiles: object, wanted: object, file: SettingsFile) -> Mapping[str, object]:
    if not isinstance(profiles, Mapping) or not profiles:
        raise UsageError(
            f"--profile {wanted}: {file.path} has no table [slurm.profiles.{wanted}]; "
            "write one with the options of that cluster."
        )
    table = profiles.get(wanted)
    if not isinstance(table, Mapping):
        near = get_close_matches(str(wanted), list(profiles), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(profiles))}."
        raise UsageError(f"--profile {wanted}: {file.path} has no such profile; {hint}")
    return table


def _settings(
    name: str, table: Mapping[str, object], file: SettingsFile, environ: Mapping[str, str]
) -> dict[str, Setting]:
    own = SettingsFile(file.path, {name: table})
    return find_settings(name, KEYS, file=own, environ=environ)


def _value(key: str, setting: Setting) -> Any:
    """A setting as its field takes it.

    Raises:
        UsageError: it is of another kind.
    """
    value = setting.value
    if key in LISTS:
        words = value.split() if isinstance(value, str) else value
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return tuple(words)
        raise UsageError(f"{setting.origin} is {value!r}: it takes a list of texts.")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UsageError(f"{setting.origin} is {value!r}: it takes a text or a whole number.")
    return _typed(key, str(value))


def _typed(key: str, value: Any) -> Any:
    if key in ("venv", "jobs_folder"):
        return Path(value).expanduser()
    return value
