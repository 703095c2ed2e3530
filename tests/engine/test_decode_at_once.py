"""Decode steps of many sequences at once, and recorded: the same results as run by run."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import StageRun
from engine.decode_batch import DecodeBatch, batch_of
from engine.decode_fitting import fit_decoding
from engine.decode_graphs import (
    MOST_RECORDINGS,
    MOST_SEQUENCES,
    DecodeGraphs,
    Size,
    StaticStep,
)
from engine.kernels import native
from engine.kv import BlockCache
from engine.rehearsal import NotRecordable, rehearse
from engine.stage import Stage
from engine.stage_loading import load_stage
from tests.support import on_meta
from tests.support.models import VOCAB, save_tiny
from tests.support.recording import run_again

EXACT = 2e-4  # float32: another order of summing
# Windows, chunks, soft caps, sinks, rotary tables by length, tables of positions, experts.
KINDS = [
    "llama",
    "mistral",
    "gemma2",
    "llama4",
    "gpt_oss",
    "phi35_longrope",
    "gpt2",
    "mixtral",
    "deepseek_v3",
    "gemma4",
]
LENGTHS = (3, 190, 40, 17, 280)  # tables of two widths


def load(folder: Path, dtype: str = "float32") -> Stage:
    return load_stage(str(folder), sections=1, index=0, dtype=dtype, device="cpu")


def tables_of(lengths: Sequence[int]) -> list[Tensor]:
    """Blocks in a shuffled order, enough for a few tokens more."""
    counts = [(length + 8) // 16 + 1 for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5))
    return list(order.split(counts))


def prefilled(stage: Stage, lengths: Sequence[int]) -> tuple[BlockCache, list[Tensor]]:
    tables = tables_of(lengths)
    cache = stage.new_cache(sum(map(len, tables)))
    for keys, values in (cache.tensors(site) for site in stage.attention_calls):
        # What nobody wrote must not be read.
        keys.fill_(float("nan")), values.fill_(float("nan"))
    generator = torch.Generator().manual_seed(6)
    for length, table in zip(lengths, tables, strict=True):
        run = StageRun(start=0, num_tokens=length, rope_length=length + 8, blocks=table)
        stage.forward(*given(stage, length, generator), [run], cache)
    return cache, tables


def given(stage: Stage, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(count, stage.hidden_size, generator=generator).to(stage.dtype)
    return torch.randint(VOCAB, (count,), generator=generator), hidden


def decoding(lengths: Sequence[int], tables: Sequence[Tensor], count: int) -> list[StageRun]:
    """The next token of the first `count` sequences, which are so long."""
    return [
        StageRun(start=length, num_tokens=1, rope_length=length + 8, blocks=table)
        for length, table in list(zip(lengths, tables, strict=True))[:count]
    ]


def decoded(
    stage: Stage, lengths: Sequence[int] = LENGTHS, steps: int = 4, counts: Sequence[int] = ()
) -> Tensor:
    """What a few decode steps give; of step i the first counts[i] sequences, or all."""
    cache, tables = prefilled(stage, lengths)
    generator = torch.Generator().manual_seed(7)
    results, now = [], list(lengths)
    for count in counts or [len(lengths)] * steps:
        runs = decoding(now, tables, count)
        results.append(stage.forward(*given(stage, count, generator), runs, cache).float())
        now[:count] = [it + 1 for it in now[:count]]
    return torch.cat(results)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_at_once_gives_what_run_by_run_gives(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load(tmp_path)
    expected = decoded(stage)
    assert bool(expected.isfinite().all())
    stage.attends_at_once = True
    assert float((decoded(stage) - expected).abs().max()) < EXACT * float(expected.abs().max())


def test_gathering_in_slices_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mistral", tmp_path)
    stage = load(tmp_path)
    stage.attends_at_once = True
    whole = decoded(stage)
    monkeypatch.setattr("engine.decode_batch.GATHERED_BYTES", 100_000)
    assert torch.allclose(decoded(stage), whole, atol=1e-5)


def test_long_contexts_are_read_where_they_are() -> None:
    def batch(*lengths: int) -> DecodeBatch | None:
        runs = [
            StageRun(start=it - 1, num_tokens=1, rope_length=it, blocks=torch.arange(-(-it // 16)))
            for it in lengths
        ]
        return batch_of(runs, torch.device("cpu"))

    assert batch(16384, 16384) is not None and batch(16385, 16384) is None
    assert batch(40000, 20, 30, 40, 50) is not None and batch(40000, 20) is None
    assert batch(20) is None  # as good by itself, and its keys are not copied


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss"])
def test_tokens_beside_parts_of_prompts_are_attended_at_once(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load(tmp_path)

    def mixed() -> Tensor:
        cache, tables = prefilled(stage, LENGTHS)
        runs = decoding(LENGTHS, tables, 5)
        runs[1] = replace(runs[1], num_tokens=5)
        runs[3] = replace(runs[3], num_tokens=3)
        batch = batch_of(runs, stage.device)
        assert batch is not None and batch.positions is None  # of the three others
        return stage.forward(*given(stage, 11, torch.Generator().manual_seed(1)), runs, cache)

    expected = mixed()
    stage.attends_at_once, stage.graphs = True, DecodeGraphs(stage, run_again, 0)
    found = mixed()
    assert float((found - expected).abs().max()) < EXACT * float(expected.abs().max())


# --- recorded ------------------------------------------------------------------------------------


class Recorder:
    """Runs the same calls again in the place of a recording, and counts."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        play, result = run_again(compute)

        def counted() -> None:
            self.played += 1
            play()

        return counted, result


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_step_filled_up_to_a_size_gives_what_it_gives_alone(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load(tmp_path)
    counts = (5, 3, 5, 1, 3, 5)
    expected = decoded(stage, counts=counts)
    recorder = Recorder()
    stage.graphs = DecodeGraphs(stage, recorder, recorded_after=0)
    found = decoded(stage, counts=counts)
    assert float((found - expected).abs().max()) < EXACT * float(expected.abs().max())
    # For 8 sequences of 32 blocks, for 4 of 16, and for 1 of 16.
    assert (recorder.recorded, recorder.played) == (3, 6)


def test_sizes_are_powers_of_two_within_bounds() -> None:
    def run(length: int, num_tokens: int = 1, adapter: Any = None) -> StageRun:
        return StageRun(
            start=length - num_tokens,
            num_tokens=num_tokens,
            rope_length=length,
            blocks=torch.arange(-(-length // 16)),
            adapter=adapter,
        )

    assert Size.of([run(1)]) == Size(1, 16)
    assert Size.of([run(256)] * 3) == Size(4, 16)
    assert Size.of([run(10), run(257)]) == Size(2, 32)
    assert Size.of([run(1000)] * 64) == Size(64, 64)
    assert Size.of([run(1025)] * 64) is None  # 64 x 2048 positions
    assert Size.of([run(1025)] * 32) == Size(32, 128)
    assert Size.of([run(16384)]) == Size(1, 1024)
    assert Size.of([run(16385)]) is None
    assert Size.of([run(4096)] + [run(20)] * 2) == Size(4, 256)
    assert Size.of([run(4096)] + [run(20)] * 7) is None  # nearly all would be filling
    assert Size.of([run(20)] * (MOST_SEQUENCES + 1)) is None
    assert Size.of([run(20), run(20, num_tokens=2)]) is None
    assert Size.of([run(20, adapter=object())]) is None
    assert Size.of([]) is None


def test_only_what_came_often_is_recorded(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path)
    recorder = Recorder()
    stage.graphs = DecodeGraphs(stage, recorder, recorded_after=4)
    decoded(stage, steps=4)
    assert recorder.recorded == 0
    decoded(stage, steps=4)  # another lease
    assert recorder.recorded == 0
    decoded(stage, steps=6)
    assert (recorder.recorded, recorder.played) == (1, 2)


def test_a_lease_has_so_many_recordings_and_they_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.decode_graphs.MOST_RECORDINGS", 2)
    assert MOST_RECORDINGS > 2
    save_tiny("llama", tmp_path)
    stage = load(tmp_path)
    recorder = Recorder()
    stage.graphs = DecodeGraphs(stage, recorder, recorded_after=0)
    lengths = (3, 4, 5, 6, 7)
    cache, tables = prefilled(stage, lengths)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 1, 4, 1, 2):
        stage.forward(*given(stage, count, generator), decoding(lengths, tables, count), cache)
    # 2 went when 4 came, since 1 was used after it.
    assert recorder.recorded == 4 and stage.graphs.count(cache) == 2
    gone = weakref.ref(cache), weakref.ref(stage)
    gc.collect()
    gc.disable()  # blocks and weights are to go at once
    try:
        del cache, stage
        assert [it() for it in gone] == [None, None]
    finally:
        gc.enable()


def test_what_cannot_be_recorded_runs_as_before_and_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path)
    expected = decoded(stage)
    tried = []

    def refuses(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tried.append(compute())
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    stage.graphs = DecodeGraphs(stage, refuses, recorded_after=0)
    with caplog.at_level(logging.WARNING, "comboio.engine"):
        assert torch.equal(decoded(stage), expected)
    assert len(tried) == 1
    (line,) = [it.getMessage() for it in caplog.records]
    assert line == (
        "decode steps are not recorded as CUDA graphs: "
        "operation not permitted when stream is capturing"
    )


# --- chosen at load ------------------------------------------------------------------------------


def test_ways_that_agree_are_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "bfloat16")
    expected = decoded(stage)
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "comboio.engine"):
        fit_decoding(stage, recorder)
    assert stage.attends_at_once and stage.graphs is not None
    assert (recorder.recorded, recorder.played) == (1, 3)
    assert [it.getMessage() for it in caplog.records] == [
        "decode steps are recorded as CUDA graphs"
    ]
    assert float((decoded(stage) - expected).norm() / expected.norm()) < 0.05


def stuck(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A recording that gives what it gave the first time."""
    return lambda: None, compute().clone()


def failing(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    raise RuntimeError("CUDA error: operation not supported")


@pytest.mark.parametrize(
    ("record", "why"),
    [(stuck, "other numbers (relative error "), (failing, "CUDA error: operation not supported")],
)
def test_recordings_that_are_wrong_or_fail_are_left_out_with_one_line(
    record: Any, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path)
    with caplog.at_level(logging.INFO, "comboio.engine"):
        fit_decoding(stage, record)
    assert stage.attends_at_once and stage.graphs is None
    (line,) = [it.getMessage() for it in caplog.records]
    assert line.startswith(f"decode steps are not recorded as CUDA graphs: {why}")


def test_attention_at_once_that_is_wrong_is_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path)
    expected = decoded(stage)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "comboio.engine"):
        # As if a device's attention ignored its mask.
        patch.setattr(
            "engine.decode_batch.scaled_dot_product_attention",
            lambda *given, attn_mask, **told: torch.zeros_like(given[0]),
        )
        fit_decoding(stage, run_again)
    assert not stage.attends_at_once and stage.graphs is None
    (line,) = [it.getMessage() for it in caplog.records]
    assert line.startswith("decode steps attend sequence by sequence on this device: other numbers")
    assert torch.equal(decoded(stage), expected)


# --- what a recording takes ----------------------------------------------------------------------

RECORDABLE = [
    "llama",
    "qwen3",
    "gemma3",
    "gpt_oss",
    "phi3",
    "gpt2",
    "gpt_neox",
    "cohere2",
    "llama4",
]


@pytest.mark.parametrize("kind", RECORDABLE)
def test_a_step_asks_nothing_of_the_host_once_its_numbers_are_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(kind, tmp_path)
    with native.chosen("torch"):  # which leaves the model's own linear modules, as a GPU does
        stage = load(tmp_path, "bfloat16")
    on_meta.move(stage, monkeypatch)
    assert stage.plain_layers == ([0, 1, 2, 3] if kind == "llama4" else [])
    step, cache = StaticStep(stage, Size(4, 16)), stage.new_cache(8)
    # Before that, it is rehearsed.
    step.record(lambda compute: (lambda: None, torch.empty(4, 32, device=stage.device)), cache)
    assert step.play(3).shape == (3, stage.hidden_size)


def test_a_step_that_asks_or_brings_something_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.cuda.is_current_stream_capturing
    save_tiny("phimoe", tmp_path)  # its rotary tables come from the host
    with native.chosen("torch"):
        stage = load(tmp_path, "bfloat16")
    on_meta.move(stage, monkeypatch)
    step, cache = StaticStep(stage, Size(4, 16)), stage.new_cache(8)
    with pytest.raises(NotRecordable, match="goes between host and device"):
        step.record(run_again, cache)
    for asks in (torch.Tensor.item, torch.nonzero, torch.bincount):
        with pytest.raises(NotRecordable, match="makes the host wait for the device"):
            rehearse(lambda asks=asks: asks(torch.tensor([3])))  # type: ignore[misc]
    numbers = torch.arange(5)
    rehearse(lambda: numbers[torch.tensor([1, 2])])
    with pytest.raises(NotRecordable, match="makes the host wait for the device"):
        rehearse(lambda: numbers[numbers > 2])
    assert torch.cuda.is_current_stream_capturing is real


def test_a_model_that_asks_its_device_is_not_recorded_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("mixtral", tmp_path)
    stage = load(tmp_path, "bfloat16")  # packed: the host sends tokens to their experts
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "comboio.engine"):
        fit_decoding(stage, recorder)
    assert stage.attends_at_once and stage.graphs is None and recorder.recorded == 0
    (line,) = [it.getMessage() for it in caplog.records]
    assert line.startswith("decode steps are not recorded as CUDA graphs: aten.")
    assert line.endswith(" makes the host wait for the device")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_any_step_stays_on_its_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of prompts beside decoded tokens, and decoded tokens in tables of two widths."""
    save_tiny(kind, tmp_path)
    with native.chosen("torch"):
        stage = load(tmp_path, "bfloat16")
    on_meta.move(stage, monkeypatch)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
    stage.attends_at_once = True
    cache, tables = stage.new_cache(80), tables_of(LENGTHS)
    decode = decoding(LENGTHS, tables, 5)
    chunk = StageRun(start=20, num_tokens=30, rope_length=60, blocks=tables[1])
    prompt = StageRun(start=0, num_tokens=9, rope_length=60, blocks=tables[0])
    for runs in (decode, [decode[3], chunk], [prompt, decode[2], chunk, decode[4]]):
        count = sum(run.num_tokens for run in runs)
        out = stage.forward(*given(stage, count, torch.Generator()), runs, cache)
        assert (out.shape, out.device.type) == ((count, stage.hidden_size), "meta")
        assert stage.logits(out).device.type == "meta"
