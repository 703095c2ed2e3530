"""`worker --stage-to`: a chain of staged workers is a chain like any other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from proto.messages import WorkerFacts
from tests.support.chains import TinyModel, save_tiny_with_tokenizer, sections_of
from tests.support.processes import WorkerProcess
from tests.support.wire import open_link

PROMPT = "the quick"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Large enough for what is beside the weights to be small; its lm_head is the embedding."""
    return save_tiny_with_tokenizer(
        tmp_path_factory.mktemp("wide"),
        hidden_size=256,
        intermediate_size=512,
        tie_word_embeddings=True,
    )


async def facts_of(address: str) -> WorkerFacts:
    """What a worker says of itself."""
    link = await open_link(address)
    await link.close()
    return link.welcome.worker


def copies_in(root: Path) -> list[Path]:
    return sorted(it for it in root.glob("*/layers-*") if it.is_dir())


def disk_bytes(folder: Path) -> int:
    return sum(it.stat().st_blocks * 512 for it in folder.iterdir())


def test_two_staged_workers_write_what_the_whole_model_writes_and_again_from_their_copies(
    call, start, wide, tmp_path
):
    expected = wide.greedy(wide.tokenizer(PROMPT)["input_ids"], 12)
    command = ("generate", PROMPT, "--max-new-tokens", "12", "--json", "--workers")
    options = ("--stage-to", str(tmp_path / "disk"), "--log-format", "json")
    for event in ("staged", "staged copy reused"):
        workers = start(*sections_of(wide.folder, 2, "--kv-memory", "8MB", *options))
        answer = call(*command, workers.option)
        assert json.loads(answer.stdout)["token_ids"] == expected, answer.stderr
        copies = copies_in(tmp_path / "disk")
        assert [it.name for it in copies] == ["layers-0-2", "layers-2-4"]
        for worker, copy in zip(workers.processes, copies, strict=True):
            logged = json.loads(worker.wait_for_stderr(f'"{event}"'))
            assert logged["folder"] == str(copy)
            facts = asyncio.run(facts_of(worker.address))
            # The manager opens the original: the copy has no embeddings.
            assert facts.model_path == str(wide.folder)
            assert facts.model == wide.folder.name
            assert 0 <= disk_bytes(copy) - facts.stage_bytes < 150_000
            if event == "staged":
                assert 0 <= logged["bytes"] - facts.stage_bytes < 100_000
                assert float(logged["mb_per_s"]) > 0
            assert worker.stop() == 0
    whole = (wide.folder / "model.safetensors").stat().st_size
    assert max(map(disk_bytes, copies)) < 0.7 * whole


def test_the_setting_may_stand_in_the_environment_and_staged_beside_unstaged_workers_agree(
    call, wide, tmp_path
):
    first, last = sections_of(wide.folder, 2, "--kv-memory", "8MB")
    with (
        WorkerProcess(*first, wait=False) as plain,
        WorkerProcess(
            *last, env={"COMBOIO_STAGE_TO": str(tmp_path / "disk")}, wait=False
        ) as staged,
    ):
        plain.wait_until_ready()
        staged.wait_until_ready()
        workers = f"{plain.address},{staged.address}"
        answer = call("generate", PROMPT, "--max-new-tokens", "9", "--json", "--workers", workers)
        said = json.loads(answer.stdout)
    assert said["token_ids"] == wide.greedy(wide.tokenizer(PROMPT)["input_ids"], 9)
    assert [it.name for it in copies_in(tmp_path / "disk")] == ["layers-2-4"]
