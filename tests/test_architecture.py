"""Reads the code of the four packages and fails, by file and line, where a rule is broken.

What is checked: which way imports point, which files stay pure, what a `--help` may load,
and constructions that have no place here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proto", "engine", "worker", "manager")

MAY_IMPORT = {
    "proto": {"proto"},
    "engine": {"engine", "proto"},
    "worker": {"worker", "engine", "proto"},
    "manager": {"manager", "engine", "proto"},
}

# Deciders and parsers: bytes or events in, values out. Whoever calls them does the I/O.
PURE_FILES = (
    "proto/errors.py",
    "proto/messages.py",
    "proto/codec.py",
    "proto/framing.py",
    "proto/session.py",
    "proto/auth.py",
    "proto/address.py",
    "proto/heartbeat.py",
    "engine/sections.py",
    "engine/requests.py",
    "engine/blocks.py",
    "engine/scheduler*.py",
    "engine/batching.py",
    "engine/pacing.py",
    "engine/roster.py",
    "engine/takeover.py",
    "engine/event_log.py",
)
IMPURE = {"asyncio", "socket", "subprocess", "os", "time", "random", "torch", "click"}
# A session over asyncio, and TLS below it; everything else in proto is free of I/O.
LINK_FILES = {"link.py", "link_protocol.py", "backpressure.py", "tls.py", "tls_transport.py"}
SOCKETS = {"asyncio", "socket", "socketserver", "ssl", "select", "selectors", "uvloop"}

# Seconds and hundreds of megabytes each: a login node has none to spare for `--help`.
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub"}

# The engine runs any decoder; code that names one has stopped doing so.
ARCHITECTURES = """
    apertus arcee baichuan bitnet bloom cohere deepseek ernie exaone falcon gemma glm gpt gptj
    granite grok helium internlm jamba lfm llama llava minimax ministral mistral mixtral
    mpt nemotron neo neox olmo olmoe phi phimoe qwen smollm stablelm starcoder yi zamba
"""


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether it loads as soon as its file does."""

    module: str
    line: int
    at_load: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def test_imports_point_from_manager_and_worker_to_engine_to_proto():
    report(
        f"{where(path, found)}: {package} must not import {found.top}"
        for path, package in source_files()
        for found in imports(path)
        if found.top in PACKAGES and found.top not in MAY_IMPORT[package]
    )


def test_proto_knows_no_torch_and_opens_sockets_in_its_link_alone():
    report(
        f"{where(path, found)}: proto must not import {found.top} here"
        for path, package in source_files()
        if package == "proto"
        for found in imports(path)
        if found.top in HEAVY or (found.top in SOCKETS and path.name not in LINK_FILES)
    )


def test_pure_files_do_no_io_and_read_no_clock():
    report(
        f"{where(path, found)}: a pure file must not import {found.module}"
        for path in pure_files()
        for found in imports(path)
        if found.top in IMPURE
    )


def test_pure_files_lean_on_pure_files_only():
    pure = pure_files()
    report(
        f"{where(path, found)}: {found.module} is not pure, and this file is"
        for path in pure
        for found in imports(path)
        for target in files_of(found.module)
        if target not in pure and target.name != "__init__.py"
    )


def test_each_pure_file_that_the_rules_name_exists():
    assert [pattern for pattern in PURE_FILES if not list(ROOT.glob(pattern))] == []


@pytest.mark.parametrize("command", ["manager", "worker"])
def test_what_a_help_page_loads_imports_nothing_heavy_at_the_top(command):
    report(
        f"{where(path, found)}: {command} --help would load {found.top}"
        for path in loaded_with(f"{command}.cli")
        for found in imports(path)
        if found.at_load and found.top in HEAVY
    )


@pytest.mark.parametrize("command", ["manager", "worker"])
def test_help_answers_without_torch(command):
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    timings, said = [], []
    for line in answer.stderr.splitlines():
        (timings if line.startswith("import time:") else said).append(line)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in timings}
    assert answer.returncode == 0, "\n".join(said)
    assert "Usage" in answer.stdout
    assert loaded & HEAVY == set()


def test_no_file_is_called_utils():
    assert [
        relative(path) for path, _ in source_files() if path.stem in {"utils", "util", "helpers"}
    ] == []


def test_nothing_unpickles_evaluates_text_or_trusts_remote_code():
    report(
        f"{relative(path)}:{node.lineno}: {fault}"
        for path, _ in source_files()
        for node in ast.walk(tree(path))
        if (fault := danger(node))
    )


def test_the_engine_names_no_architecture():
    report(
        f"{relative(path)}:{line}: {text!r} names an architecture"
        for path, package in source_files()
        if package == "engine" and "demo" not in path.relative_to(ROOT).parts
        for line, text in words_of_code(tree(path))
        if architectures_in(text)
    )


def test_a_rule_that_is_broken_is_reported_by_file_and_line():
    bad = ast.parse("import pickle\nx = eval('1')\nm = load(trust_remote_code=True)\n")
    assert [node.lineno for node in ast.walk(bad) if danger(node)] == [1, 2, 3]
    named = ast.parse('"""Llama in a docstring is fine."""\nif kind == "llama3": Qwen2Config()\n')
    assert [line for line, text in words_of_code(named) if architectures_in(text)] == [2, 2]


# --- reading the code -----------------------------------------------------------------------


def report(faults: Iterator[str]) -> None:
    found = sorted(set(faults))
    assert not found, "\n" + "\n".join(found)


def source_files() -> list[tuple[Path, str]]:
    return [
        (path, package) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
    ]


def pure_files() -> list[Path]:
    """The files named above, and every other whose first docstring says that it is pure."""
    named = {path for pattern in PURE_FILES for path in ROOT.glob(pattern)}
    said = {path for path, _ in source_files() if "Pure" in (ast.get_docstring(tree(path)) or "")}
    return sorted(named | said)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def where(path: Path, found: Import) -> str:
    return f"{relative(path)}:{found.line}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file; those inside functions or for type checkers do not load with it."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return tuple(_imports_in(tree(path), package, at_load=True))


def _imports_in(node: ast.AST, package: str, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_load)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*above, base] if base else above)
            yield Import(base, child.lineno, at_load)
            # `from manager import batch` loads manager/batch.py as well.
            for alias in child.names:
                if files_of(f"{base}.{alias.name}"):
                    yield Import(f"{base}.{alias.name}", child.lineno, at_load)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            loads = at_load and not is_function and not _is_for_type_checkers(child)
            yield from _imports_in(child, package, at_load=loads)


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def files_of(module: str) -> list[Path]:
    """The file of one of our modules; none for anybody else's."""
    if module.partition(".")[0] not in PACKAGES:
        return []
    base = ROOT.joinpath(*module.split("."))
    return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]


def loaded_with(module: str) -> set[Path]:
    """The files of ours that load when `module` is imported."""
    waiting, seen = files_of(module), set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for found in imports(path):
            if found.at_load:
                waiting += files_of(found.module)
                waiting += files_of(found.top)
    return seen


def danger(node: ast.AST) -> str | None:
    """What is wrong with a construction that must not occur, or None."""
    match node:
        case ast.Import(names=names) if banned := {n.name for n in names} & UNSAFE_MODULES:
            return f"imports {', '.join(banned)}"
        case ast.ImportFrom(module=str(module)) if module in UNSAFE_MODULES:
            return f"imports {module}"
        case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
            return f"calls {name}()"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            return "torch.load can unpickle; read safetensors"
        case ast.keyword(arg="trust_remote_code", value=value) if not is_false(value):
            return "trust_remote_code runs code out of a checkpoint"
        case ast.keyword(arg="shell", value=value) if not is_false(value):
            return "shell=True; pass a list of words"
    return None


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def architectures_in(text: str) -> set[str]:
    """The names among the words of an identifier or a string: `Qwen3Config` has `qwen`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
    return {word.lower() for word in words} & set(ARCHITECTURES.split())


def words_of_code(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and strings with their lines; docstrings and comments are prose."""
    prose = {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(module):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield node.lineno, text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                yield node.lineno, name
            case ast.alias(name=name):
                yield node.lineno, name


def test_every_package_is_in_the_distribution():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in ("proto", "engine", "worker", "manager")
        for file in (ROOT / package).rglob("__init__.py")
    }
    listed = set(settings["packages"]) - set(settings["package-dir"])
    assert listed == folders
    for folder in settings["package-dir"].values():
        assert (ROOT / folder).is_dir()
