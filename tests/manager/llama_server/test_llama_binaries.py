"""Finding llama.cpp's programs: where they are looked for, and why they may not run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from manager.llama_server.binaries import (
    Build,
    build_of,
    check_same_build,
    find_rpc_server,
    find_server,
    free_device_bytes,
)
from proto.errors import Error, UsageError
from tests.support.llama_cpp import llama_cpp_dir

PLAIN_PATH = "/usr/bin:/bin"


@pytest.fixture
def bin_folder() -> Path:
    folder = llama_cpp_dir()
    assert folder is not None
    return folder


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def refused(folder: Path | None, *, rpc: bool = True, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        find_server(folder, {"PATH": PLAIN_PATH, **environ}, needs_rpc=rpc)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.llama_cpp
def test_the_programs_are_found_by_folder_by_name_by_variable_and_on_path(bin_folder):
    plain = {"PATH": PLAIN_PATH}
    ways = [
        (bin_folder, plain),
        (bin_folder.parent, plain),
        (bin_folder / "llama-server", plain),
        (None, {**plain, "LLAMA_CPP_DIR": str(bin_folder.parent)}),
        (None, {"PATH": f"{bin_folder}:{PLAIN_PATH}"}),
    ]
    for folder, environ in ways:
        server = find_server(folder, environ, needs_rpc=True)
        assert server.path == bin_folder / "llama-server"
        assert server.has_rpc
        assert server.version
        assert {"-ngl", "-ts", "--cache-ram", "--port"} <= server.flags
        rpc_server = find_rpc_server(folder, environ)
        assert rpc_server.path.name in ("rpc-server", "ggml-rpc-server")
        assert {"-H", "-p", "-t"} <= rpc_server.flags


@pytest.mark.llama_cpp
def test_the_older_name_of_rpc_server_is_known(bin_folder, tmp_path):
    newer = find_rpc_server(bin_folder, os.environ)
    script = f'LD_LIBRARY_PATH={newer.library_folder or ""} exec {newer.path} "$@"'
    older = program(tmp_path, "rpc-server", script)
    assert find_rpc_server(tmp_path, os.environ).path == older


@pytest.mark.llama_cpp
def test_a_machine_without_gpus_lends_no_memory_of_theirs(bin_folder):
    server = find_server(bin_folder, os.environ, needs_rpc=True)
    assert free_device_bytes(server, os.environ) >= 0


@pytest.mark.llama_cpp
def test_a_missing_library_is_named(bin_folder, tmp_path):
    server = find_server(bin_folder, {"PATH": PLAIN_PATH}, needs_rpc=True)
    if server.library_folder is None:
        pytest.skip("this build finds its libraries by itself")
    shutil.copy(server.path, tmp_path / "llama-server")
    sentence = refused(tmp_path)
    assert "does not find the library lib" in sentence
    assert "add the folder that has it to LD_LIBRARY_PATH" in sentence


def test_nothing_there_is_told_with_where_it_was_looked_for(tmp_path):
    assert f"there is no llama-server in dir_llama_script, {tmp_path}: build" in refused(tmp_path)
    assert "there is no such folder" in refused(tmp_path / "no")
    assert "in LLAMA_CPP_DIR, " in refused(None, LLAMA_CPP_DIR=str(tmp_path))
    assert "there is no llama-server in PATH: build llama.cpp with -DGGML_RPC=ON" in refused(None)
    with pytest.raises(UsageError, match="there is no rpc-server or ggml-rpc-server in"):
        find_rpc_server(tmp_path, {"PATH": PLAIN_PATH})


def test_a_file_that_is_not_executable_is_told(tmp_path):
    path = program(tmp_path, "llama-server", "")
    path.chmod(0o644)
    if os.access(path, os.X_OK):
        pytest.skip("this user may run everything")
    assert refused(tmp_path) == f"{path} is not executable: run chmod +x {path}."


def test_a_server_without_rpc_is_enough_for_one_node_alone(tmp_path):
    help_text = 'echo "-m,    --model FNAME     the model"; echo "version: 1 (abc)"'
    path = program(tmp_path / "build/bin", "llama-server", help_text)
    sentence = refused(tmp_path)
    assert f"{path} (1 (abc)) was built without RPC" in sentence
    assert "build llama.cpp with -DGGML_RPC=ON, or run on one node." in sentence
    server = find_server(tmp_path, {"PATH": PLAIN_PATH}, needs_rpc=False)
    assert server.flags == {"-m", "--model"}


def test_a_program_for_another_machine_is_told(tmp_path):
    program(tmp_path / "cpu", "llama-server", "kill -ILL $$")
    assert "was ended by SIGILL (it was built for another CPU: build it" in refused(
        tmp_path / "cpu"
    )
    path = program(tmp_path / "elf", "llama-server", "")
    path.write_bytes(b"\x7fELF of another kind")
    assert "cannot run here: it is no program of this kind of machine" in refused(tmp_path / "elf")
    path = program(tmp_path / "interpreter", "llama-server", "")
    path.write_text("#!/no/such/shell\n")
    assert "what it is started with is not there" in refused(tmp_path / "interpreter")
    program(tmp_path / "old", "llama-server", "echo GLIBC_9.9 not found; exit 1")
    assert "left with exit code 1; it said: GLIBC_9.9 not found." in refused(tmp_path / "old")


@pytest.mark.llama_cpp
def test_one_build_is_one_build_wherever_it_lies(bin_folder, tmp_path):
    copy = shutil.copytree(bin_folder.parent, tmp_path / "copy", symlinks=True)
    builds = [
        build_of(find_server(it, os.environ, needs_rpc=True), find_rpc_server(it, os.environ))
        for it in (bin_folder, copy / bin_folder.name)
    ]
    assert builds[0] == builds[1]
    check_same_build({"node1": builds[0], "node2": builds[1]})


def test_nodes_with_different_builds_are_refused_by_name():
    first = Build("1 (commit abc)", "d1")
    check_same_build({"node1": first, "node2": Build("1 (commit abc)", "d2")})
    with pytest.raises(Error, match=r"node1 has llama\.cpp 1 \(commit abc\) and node3 has 2 \(com"):
        check_same_build({"node1": first, "node2": first, "node3": Build("2 (commit x)", "d2")})
    with pytest.raises(Error, match="of no version"):
        check_same_build({"node1": Build("", "d1"), "node2": Build("", "d2")})
