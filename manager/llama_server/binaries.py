"""Find llama.cpp's programs, and learn what they are: version, flags, RPC, the build.

A program is asked (`--version`, `--help`) before it is used, so that one that cannot start is a
sentence here and not an early end later. Knows no model and starts no server.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from proto.errors import Error, UsageError

SERVER_NAMES: Final = ("llama-server",)
RPC_SERVER_NAMES: Final = ("rpc-server", "ggml-rpc-server")  # older name, newer name
BELOW: Final = ("", "bin", "build/bin")  # where a folder of llama.cpp has its programs
LIBRARIES_BESIDE: Final = ("../lib", "../lib64", ".", "../bin")  # seen from the program
LIBRARY_VARIABLE: Final = "LD_LIBRARY_PATH"
ASK_TIMEOUT_S: Final = 60.0  # a program of 500 MB on a slow file system
READ_BYTES: Final = 1024 * 1024

HOW_TO_GET: Final = (
    "build llama.cpp with -DGGML_RPC=ON and name its folder with dir_llama_script, "
    "--dir-llama-script or LLAMA_CPP_DIR"
)
OTHER_CPU: Final = "it was built for another CPU: build it on this kind of machine, or for all"

_FLAGS: Final = re.compile(r"^ {0,4}(?:--?[A-Za-z][\w-]*[,\s]+)+", re.MULTILINE)
# "  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)"
_DEVICE: Final = re.compile(r"^ +[A-Za-z]+\d+: .*\(\d+ MiB, (\d+) MiB free\)$", re.MULTILINE)
_LIBRARY: Final = re.compile(r"error while loading shared libraries: ([^:]+):")


@dataclass(frozen=True, slots=True)
class Program:
    """One program that can be started."""

    path: Path
    flags: frozenset[str]  # what its --help knows, with the dashes
    library_folder: Path | None = None  # where it finds its libraries, if not by itself

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What it is started with."""
        # Without it an abort starts a debugger, if there is one, and writes pages.
        return with_libraries({**environ, "GGML_NO_BACKTRACE": "1"}, self.library_folder)


@dataclass(frozen=True, slots=True)
class ServerProgram(Program):
    """llama-server."""

    version: str = ""  # as it says: "0.5.0-dev (build 1, commit 0c1e570)"

    @property
    def has_rpc(self) -> bool:
        """Whether it was built to use rpc-servers."""
        return "--rpc" in self.flags


@dataclass(frozen=True, slots=True)
class Build:
    """What must be the same on all nodes that work on one model."""

    version: str
    digest: str = field(repr=False)  # of the programs and their ggml libraries


def find_server(
    folder: Path | None, environ: Mapping[str, str], *, needs_rpc: bool
) -> ServerProgram:
    """llama-server, asked for its version and flags.

    Args:
        folder: dir_llama_script; None looks into $LLAMA_CPP_DIR, else on PATH.
    Raises:
        UsageError: it is not there, cannot run here, or has no RPC and needs it.
    """
    path = _find(SERVER_NAMES, folder, environ)
    said, library_folder = _ask(path, "--help", environ)
    version, _ = _ask(path, "--version", environ)
    program = ServerProgram(path, _flags_of(said), library_folder, _version_of(version))
    if needs_rpc and not program.has_rpc:
        raise UsageError(
            f"{path} ({program.version}) was built without RPC, which several nodes need: "
            "build llama.cpp with -DGGML_RPC=ON, or run on one node."
        )
    return program


def find_rpc_server(folder: Path | None, environ: Mapping[str, str]) -> Program:
    """rpc-server, under its older or newer name.

    Raises:
        UsageError: it is not there, or cannot run here.
    """
    path = _find(RPC_SERVER_NAMES, folder, environ)
    said, library_folder = _ask(path, "--help", environ)
    return Program(path, _flags_of(said), library_folder)


def free_device_bytes(program: ServerProgram, environ: Mapping[str, str]) -> int:
    """Free memory of this machine's GPUs, as llama.cpp sees them; 0 without any."""
    if "--list-devices" not in program.flags:
        return 0
    _, said = _run(program.path, "--list-devices", with_libraries(environ, program.library_folder))
    return sum(int(free) for free in _DEVICE.findall(said)) * 2**20


def build_of(server: ServerProgram, rpc_server: Program | None) -> Build:
    """What these programs are. Reads all of them and of ggml's libraries."""
    digest = hashlib.sha256()
    files = [server.path, *([rpc_server.path] if rpc_server is not None else [])]
    for path in [*files, *_ggml_libraries(server)]:
        digest.update(_short(path).encode())
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    return Build(server.version, digest.hexdigest())


def check_same_build(builds: Mapping[str, Build]) -> None:
    """Refuse nodes whose programs differ.

    Programs of one version that were compiled for each kind of node apart are no difference.

    Args:
        builds: node -> what it found there.
    Raises:
        Error: names two nodes and what they have.
    """
    nodes = list(builds)
    for node in nodes[1:]:
        first, other = builds[nodes[0]], builds[node]
        has_commit = "commit" in first.version or "(" in first.version
        if other.digest == first.digest or (has_commit and other.version == first.version):
            continue
        raise Error(
            f"{nodes[0]} has llama.cpp {first.version or 'of no version'} and {node} has "
            f"{other.version or 'one of no version'}, built differently: llama-server and its "
            "rpc-servers must be of one build. Use the same dir_llama_script on all nodes."
        )


def with_libraries(environ: Mapping[str, str], folder: Path | None) -> dict[str, str]:
    """The environment in which a program finds the libraries of this folder."""
    if folder is None:
        return dict(environ)
    paths = [str(folder), *filter(None, [environ.get(LIBRARY_VARIABLE)])]
    return {**environ, LIBRARY_VARIABLE: os.pathsep.join(paths)}


def ending(code: int) -> str:
    """How a process ended, for a sentence."""
    if code >= 0:
        return f"left with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why: dict[int, str] = {
        signal.SIGILL: f" ({OTHER_CPU})",
        signal.SIGKILL: " (often because the machine was out of memory)",
    }
    return f"was ended by {name}{why.get(-code, '')}"


# --- looking ----------------------------------------------------------------------------------


def _find(names: Sequence[str], folder: Path | None, environ: Mapping[str, str]) -> Path:
    """The first of these names that is there.

    Raises:
        UsageError: none is, or what is there is no program.
    """
    named = folder or (Path(environ["LLAMA_CPP_DIR"]) if environ.get("LLAMA_CPP_DIR") else None)
    if named is None:
        on_path = [shutil.which(name, path=environ.get("PATH", "")) for name in names]
        places = [Path(found) for found in on_path if found]
        looked_in = "PATH"
    else:
        origin = "dir_llama_script" if folder is not None else "LLAMA_CPP_DIR"
        looked_in = f"{origin}, {named}"
        if not named.exists():
            raise UsageError(f"{looked_in}: there is no such folder.")
        root = named.parent if named.is_file() else named  # the program itself was named
        places = [root / below / name for below in BELOW for name in names]
    for place in places:
        if place.is_file():
            _check_executable(place)
            return Path(os.path.abspath(place))
    raise UsageError(f"there is no {' or '.join(names)} in {looked_in}: {HOW_TO_GET}.")


def _check_executable(path: Path) -> None:
    if not os.access(path, os.X_OK):
        raise UsageError(f"{path} is not executable: run chmod +x {path}.")


# --- asking -----------------------------------------------------------------------------------


def _ask(path: Path, question: str, environ: Mapping[str, str]) -> tuple[str, Path | None]:
    """(what the program says to `--help` or `--version`, where its libraries are).

    Raises:
        UsageError: it cannot run here.
    """
    code, said = _run(path, question, environ)
    library = _LIBRARY.search(said)
    if library is None:
        return _answer(path, code, said), None
    for beside in LIBRARIES_BESIDE:
        folder = Path(os.path.normpath(path.parent / beside))
        if (folder / library[1]).exists():
            code, said = _run(path, question, with_libraries(environ, folder))
            if not _LIBRARY.search(said):
                return _answer(path, code, said), folder
    lacking = (_LIBRARY.search(said) or library)[1]
    raise UsageError(
        f"{path} does not find the library {lacking}: add the folder that has it to "
        f"{LIBRARY_VARIABLE}, or load the module that it comes with."
    )


def _answer(path: Path, code: int, said: str) -> str:
    if code == 0:
        return said
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    words = f"; it said: {last.strip()}" if last else ""
    raise UsageError(f"{path} cannot run here: it {ending(code)}{words}.")


def _run(path: Path, question: str, environ: Mapping[str, str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [path, question],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environ, "GGML_NO_BACKTRACE": "1"},
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{path} {question} did not answer within {ASK_TIMEOUT_S:g} seconds: "
            "try it by hand; its file system or its GPU may be stuck."
        ) from None
    except OSError as exc:
        reason = f"{exc.strerror}"
        if exc.errno == errno.ENOEXEC:
            reason = "it is no program of this kind of machine"
        elif exc.errno == errno.ENOENT:  # of the loader or interpreter that it names
            reason = "what it is started with is not there (another Linux, or a broken script)"
        raise UsageError(f"{path} cannot run here: {reason}.") from exc
    return done.returncode, done.stdout.decode("utf-8", "replace")


def _flags_of(said: str) -> frozenset[str]:
    """Flags stand at the start of a line of --help, several with commas."""
    return frozenset(
        flag for block in _FLAGS.findall(said) for flag in re.split(r"[,\s]+", block) if flag
    )


def _version_of(said: str) -> str:
    match = re.search(r"^version: *(.+)$", said, re.MULTILINE)
    return match[1].strip() if match else ""


def _ggml_libraries(program: Program) -> list[Path]:
    """ggml's libraries beside a program, each once, whatever links point at it."""
    beside = [program.path.parent / it for it in LIBRARIES_BESIDE]
    folders = [program.library_folder] if program.library_folder else beside
    found = {
        Path(os.path.realpath(library)) for it in folders for library in it.glob("libggml*.so*")
    }
    # What were links may have become copies on the way, as in a wheel.
    return sorted(
        {(_short(path), path.stat().st_size): path for path in found}.values(), key=_short
    )


def _short(path: Path) -> str:
    """libggml.so.0.25.3 and its links have one name here."""
    return path.name.partition(".so")[0]
