from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "engine" / "kernels"
[EXTENSION] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "ext-modules"
]
BUILD = "import sys, setuptools; sys.argv[0] = 'setup.py'; setuptools.setup()"


def test_every_c_file_is_compiled_and_every_header_known():
    assert set(EXTENSION["sources"]) == {f"engine/kernels/{it.name}" for it in KERNELS.glob("*.c")}
    assert set(EXTENSION["depends"]) == {f"engine/kernels/{it.name}" for it in KERNELS.glob("*.h")}


def test_without_a_compiler_the_build_goes_on(tmp_path):
    done = build(tmp_path, {"CC": "/nonexistent/cc"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_every_file_compiles_without_a_warning(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs gcc or clang")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        pytest.skip(f"needs Python's headers in {include}")
    # Without optimisation, which takes most of the time; inlining is still forced where needed.
    done = subprocess.run(
        [
            compiler, "-fsyntax-only", "-std=gnu11", "-Wall", "-Wextra", "-Werror",
            "-Wno-unused-parameter", "-Wno-missing-field-initializers", f"-I{include}",
            *(ROOT / it for it in EXTENSION["sources"]),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("choice", "words"),
    [("fast", "no kernels are called 'fast'"), ("neon", "cannot be used here")],
)
def test_kernels_that_are_not_here_are_refused_in_a_sentence(choice, words):
    from engine.kernels import native
    from proto.errors import UsageError

    if choice in native.available():
        pytest.skip("this machine has it")
    with pytest.raises(UsageError, match=words if native.library else None):
        native.choose(choice)


def test_the_environment_can_name_the_kernels():
    done = subprocess.run(
        [sys.executable, "-c", "from engine.kernels import native; print(native.name())"],
        env=os.environ | {"COMBOIO_KERNELS": "torch"}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "torch"


@pytest.mark.parametrize("found", ["VERSION = 0", ""])
def test_what_was_compiled_of_another_version_is_left_alone_and_said_to_be(tmp_path, found):
    """As after a pull into a checkout, whose compiled part is still the one from before."""
    (tmp_path / "_native.py").write_text(found)
    code = (
        "import engine.kernels; engine.kernels.__path__.insert(0, sys.argv[1])\n"
        "from engine.kernels import native; from proto.errors import UsageError\n"
        "print(native.name(), native.description(), sep='\\n')\n"
        "try: native.choose('portable')\n"
        "except UsageError as exc: print(exc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={key: it for key, it in os.environ.items() if key != "COMBOIO_KERNELS"},
    )  # fmt: skip
    name, description, refusal = done.stdout.splitlines()
    assert name == "torch"
    assert description.startswith("torch, since the compiled part of Comboio")
    assert str(tmp_path / "_native.py") in description
    assert "pip install -e ." in description
    assert refusal.startswith("the kernels 'portable' cannot be used here: ")
    assert "pip install -e ." in refusal


def test_the_compiled_part_says_the_version_that_python_wants():
    from engine.kernels import native

    header = (KERNELS / "native.h").read_text()
    assert f"enum {{ KERNELS_VERSION = {native.VERSION} }};" in header


def build(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What installing does with the C files, into a folder of its own."""
    return subprocess.run(
        [
            sys.executable, "-c", BUILD, "build_ext",
            "--build-temp", folder / "temp", "--build-lib", folder / "lib", "--force",
        ],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
