"""Checkpoints by hub id: from the cache without a network, or only the files that are needed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.stage_loading import load_stage
from tests.support.hub import COMMIT, REPO, fill_cache, serve
from tests.support.local_chain import cut
from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"

# huggingface_hub reads its environment when it is imported, so each load is a process.
LOAD_STAGE = """
import json, sys
from engine.stage_loading import load_stage
from proto.errors import Error
start, end = map(int, sys.argv[2].split(":"))
try:
    stage = load_stage(sys.argv[1], layers=(start, end), dtype="float32", device="cpu")
except Error as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
else:
    print(json.dumps({"fingerprint": stage.fingerprint, "read": stage.read_bytes,
                      "held": stage.stage_bytes, "name": stage.model_name}))
"""
LOAD_ENTRY = """
import json, sys
from engine.entry import load_entry
from proto.errors import Error
try:
    entry = load_entry(sys.argv[1], dtype="float32")
except Error as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
else:
    print(json.dumps({"fingerprint": entry.fingerprint, "tokens": entry.tokenizer.encode("a fox"),
                      "sum": float(entry.embed([1, 2, 3], [0, 1, 2]).sum())}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_tiny("llama", folder, max_shard_size="1KB")
    save_tokenizer(folder, 300)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def shard(folder: Path, key: str) -> str:
    """The file that holds one tensor."""
    name: str = json.loads((folder / INDEX).read_text())["weight_map"][key]
    return name


def shards_of(folder: Path, *prefixes: str) -> set[str]:
    files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return {file for key, file in files.items() if key.startswith(prefixes)}


def in_a_process(script: str, cache: Path, *args: str, **environment: str) -> dict[str, Any]:
    """What a load prints; HF_HUB_OFFLINE is set as everywhere in the tests, or as told."""
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(cache.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    if "error" in answer:
        assert "\n" not in answer["error"]
        assert answer["code"] == 2
    return answer


def test_a_cached_model_loads_by_its_id_without_a_network(folder: Path, cache: Path) -> None:
    fill_cache(cache, folder)
    by_folder = load_stage(str(folder), layers=(1, 3), dtype="float32", device="cpu")
    by_id = in_a_process(LOAD_STAGE, cache, REPO, "1:3")
    assert by_id == {
        "fingerprint": by_folder.fingerprint,
        "read": by_folder.read_bytes,
        "held": by_folder.stage_bytes,
        "name": REPO,
    }


def test_the_manager_finds_tokenizer_and_embeddings_in_the_cache(folder: Path, cache: Path) -> None:
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", INDEX}
    fill_cache(cache, folder, [*needed, shard(folder, "model.embed_tokens.weight")])
    answer = in_a_process(LOAD_ENTRY, cache, REPO)
    entry = cut(folder, [(0, 4)]).entry
    assert answer == {
        "fingerprint": entry.fingerprint,
        "tokens": entry.tokenizer.encode("a fox"),
        "sum": pytest.approx(float(entry.embed([1, 2, 3], [0, 1, 2]).sum())),
    }


def test_a_cache_with_only_the_sections_files_is_enough(folder: Path, cache: Path) -> None:
    own = shards_of(folder, "model.layers.2.")
    fill_cache(cache, folder, ["config.json", INDEX, *own])
    answer = in_a_process(LOAD_STAGE, cache, REPO, "2:3")
    assert answer["read"] == answer["held"] > 0
    assert answer["fingerprint"] == Checkpoint(str(folder)).fingerprint


def test_a_file_that_is_not_in_the_cache_is_named(folder: Path, cache: Path) -> None:
    missing = shard(folder, "model.layers.2.mlp.up_proj.weight")
    fill_cache(cache, folder, [it.name for it in folder.iterdir() if it.name != missing])
    answer = in_a_process(LOAD_STAGE, cache, REPO, "2:3")
    assert f"{missing} of {REPO} is missing" in answer["error"]
    assert in_a_process(LOAD_STAGE, cache, REPO, "1:2")["read"] > 0


def test_a_single_file_in_the_cache_is_enough(tmp_path: Path, cache: Path) -> None:
    save_tiny("llama", tmp_path / "single")
    fill_cache(cache, tmp_path / "single")
    assert in_a_process(LOAD_STAGE, cache, REPO, "0:4")["read"] > 0


def test_the_commit_that_main_names_is_taken(folder: Path, cache: Path) -> None:
    snapshot = fill_cache(cache, folder)
    other = snapshot.with_name("f" * 40)
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert in_a_process(LOAD_STAGE, cache, REPO, "0:1")["read"] > 0
    (snapshot.parents[1] / "refs" / "main").write_text(other.name)
    assert "error" in in_a_process(LOAD_STAGE, cache, REPO, "0:1")


@pytest.mark.parametrize("model", ["nobody/nothing", "nothing"])
def test_an_id_that_is_not_in_the_cache(model: str, cache: Path) -> None:
    answer = in_a_process(LOAD_STAGE, cache, model, "0:1")
    assert f"--model '{model}' is no folder here" in answer["error"]
    assert "HF_HUB_OFFLINE is set" in answer["error"]


@pytest.mark.parametrize("model", ["a b/c", "some..body/x", "-x", "x/.."])
def test_what_is_neither_folder_nor_id(model: str, cache: Path) -> None:
    answer = in_a_process(LOAD_STAGE, cache, model, "0:1")
    assert f"--model '{model}' is neither a folder nor a hub id" in answer["error"]


def test_pickled_weights_on_the_hub_are_refused(folder: Path, cache: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    fill_cache(cache, folder, ["config.json", "pytorch_model.bin"])
    answer = in_a_process(LOAD_STAGE, cache, REPO, "0:1")
    assert f"{REPO} holds pytorch_model.bin but no safetensors" in answer["error"]


# --- with a hub ------------------------------------------------------------------------------

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def test_only_the_files_of_the_section_are_downloaded(folder: Path, cache: Path) -> None:
    with serve(folder) as hub:
        answer = in_a_process(LOAD_STAGE, cache, REPO, "1:2", HF_ENDPOINT=hub.url, **ONLINE)
    assert answer["read"] == answer["held"] > 0
    own = shards_of(folder, "model.layers.1.")
    assert set(hub.downloaded) == {"config.json", INDEX} | own
    assert len(hub.downloaded) == len(set(hub.downloaded))
    # What was downloaded serves the next start without a network; nothing else is there.
    assert in_a_process(LOAD_STAGE, cache, REPO, "1:2") == answer
    snapshot = cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
    assert {it.name for it in snapshot.iterdir()} == set(hub.downloaded)


def test_the_manager_downloads_no_decoder_layer(folder: Path, cache: Path) -> None:
    with serve(folder) as hub:
        answer = in_a_process(LOAD_ENTRY, cache, REPO, HF_ENDPOINT=hub.url, **ONLINE)
    assert "error" not in answer
    embeddings = shard(folder, "model.embed_tokens.weight")
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", INDEX, embeddings}
    assert needed <= set(hub.downloaded)
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == {embeddings}
    assert in_a_process(LOAD_ENTRY, cache, REPO) == answer


def test_a_model_that_the_hub_does_not_have(folder: Path, cache: Path) -> None:
    with serve(folder) as hub:
        answer = in_a_process(
            LOAD_STAGE, cache, "nobody/nothing", "0:1", HF_ENDPOINT=hub.url, **ONLINE
        )
    assert "nobody/nothing" in answer["error"]


def test_a_hub_that_cannot_be_reached_is_said(cache: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        answer = in_a_process(LOAD_STAGE, cache, REPO, "0:1", HF_ENDPOINT=url, **ONLINE)
    assert REPO in answer["error"]
    assert "cannot be reached" in answer["error"]


def test_a_cached_model_loads_though_the_hub_cannot_be_reached(folder: Path, cache: Path) -> None:
    fill_cache(cache, folder)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        answer = in_a_process(LOAD_STAGE, cache, REPO, "0:1", HF_ENDPOINT=url, **ONLINE)
    assert answer["read"] > 0
