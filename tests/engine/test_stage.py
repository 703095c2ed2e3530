"""A stage: what it says of itself, its KV blocks, and steps that are not well formed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention import StageRun
from engine.kv import BLOCK_TOKENS
from engine.stage import Stage
from engine.stage_loading import load_stage
from proto.errors import RemoteProtocolError, UsageError
from tests.support.local_chain import Chain, cut
from tests.support.models import VOCAB, save_tiny, tiny_model

PROMPT = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def stage(folder: Path) -> Stage:
    return load_stage(str(folder), layers=(1, 3), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def last(folder: Path) -> Stage:
    return load_stage(str(folder), layers=(3, 4), dtype="float32", device="cpu")


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(len(PROMPT), 32, generator=torch.Generator().manual_seed(4))


def run(start: int, stop: int, *blocks: int) -> StageRun:
    return StageRun(
        start=start, num_tokens=stop - start, rope_length=stop, blocks=torch.tensor(blocks)
    )


def test_it_says_what_it_holds(stage: Stage, last: Stage, folder: Path) -> None:
    assert (stage.start_layer, stage.end_layer, stage.num_layers) == (1, 3, 4)
    assert (stage.hidden_size, stage.vocab_size, stage.max_context) == (32, VOCAB, 512)
    assert (stage.dtype_name, stage.model_name) == ("float32", folder.name)
    assert stage.device_name.startswith("cpu")
    assert not stage.is_last
    assert last.is_last


def test_a_block_holds_keys_and_values_of_all_its_layers(stage: Stage, last: Stage) -> None:
    a_layer = BLOCK_TOKENS * 2 * 2 * 8 * 4  # tokens, keys and values, kv heads, head size, float32
    assert stage.block_tokens == BLOCK_TOKENS
    assert stage.block_bytes == 2 * a_layer
    assert last.block_bytes == a_layer


def test_a_block_of_half_precision_is_half_as_large(folder: Path, stage: Stage) -> None:
    half = load_stage(str(folder), layers=(1, 3), dtype="bfloat16", device="cpu")
    assert half.block_bytes * 2 == stage.block_bytes
    # Packed rows have whole groups of columns, which a matrix of 48 columns must be padded to.
    assert stage.stage_bytes / 2 <= half.stage_bytes < stage.stage_bytes == half.read_bytes


def test_a_block_in_8_bits_has_a_scale_for_each_token_and_head(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        rounded = load_stage(
            str(folder), layers=(1, 3), dtype=dtype, device="cpu", kv_quantize="int8"
        )
        a_layer = BLOCK_TOKENS * 2 * 2 * (8 + 2)  # tokens, keys and values, kv heads, their bytes
        assert rounded.block_bytes == 2 * a_layer
        cache = rounded.new_cache(5)
        held = [
            tensor
            for site in rounded.attention_calls
            for tensor in (*cache.tensors(site), *(cache.scales(site) or ()))
        ]
        assert sum(it.nbytes for it in held) == 5 * rounded.block_bytes


def test_a_model_whose_keys_lose_too_much_in_8_bits_is_refused(tmp_path: Path) -> None:
    """Numbers that queries make nothing of, and so large that beside them all others are zero."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, factor in ((attention.q_proj, 0.0), (attention.k_proj, 1e4)):
            heads = projection.weight.data.view(-1, 8, 32)
            heads[:, [0, 4]] *= factor  # rotary positions mix these two
        attention.q_proj.weight.data *= 1e2
    model.save_pretrained(tmp_path)
    load_stage(str(tmp_path), layers=(0, 2), device="cpu")
    with pytest.raises(UsageError) as refused:
        load_stage(str(tmp_path), layers=(0, 2), device="cpu", kv_quantize="int8")
    assert "--kv-quantize int8: Llama" in str(refused.value)
    assert "start the worker without it" in str(refused.value)


def test_what_it_returns_is_new_memory(stage: Stage, hidden: Tensor) -> None:
    before = hidden.clone()
    out = stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], stage.new_cache(3))
    assert out.shape == hidden.shape
    assert out.dtype == torch.float32
    assert out.untyped_storage().data_ptr() != hidden.untyped_storage().data_ptr()
    assert torch.equal(hidden, before)


def test_two_leases_do_not_see_each_other(stage: Stage, hidden: Tensor) -> None:
    ours, theirs = stage.new_cache(3), stage.new_cache(3)
    expected = stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], ours)[20:]
    stage.forward(PROMPT[:20], hidden[:20], [run(0, 20, 0, 1)], ours)
    stage.forward(PROMPT, hidden.flip(0), [run(0, 40, 0, 1, 2)], theirs)
    rest = stage.forward(PROMPT[20:], hidden[20:], [run(20, 40, 0, 1, 2)], ours)
    assert torch.allclose(rest, expected, atol=1e-4)


def test_it_writes_its_own_slots_only(stage: Stage, hidden: Tensor) -> None:
    """Tokens 20 to 29 of a sequence in blocks 4, 1: the other slots stay as they were."""
    cache = stage.new_cache(6)
    everywhere = run(0, 6 * BLOCK_TOKENS, *range(6))
    many = torch.randn(6 * BLOCK_TOKENS, 32)
    stage.forward(torch.zeros(len(many)).long(), many, [everywhere], cache)
    before = snapshot(stage, cache)
    stage.forward(PROMPT[20:30], hidden[20:30], [run(20, 30, 4, 1)], cache)
    changed = {
        slot
        for old, new in zip(before, snapshot(stage, cache), strict=True)
        for slot in (old != new).flatten(1).any(dim=1).nonzero().flatten().tolist()
    }
    assert changed == {BLOCK_TOKENS + offset for offset in range(4, 14)}


def snapshot(stage: Stage, cache: object) -> list[Tensor]:
    """Copies of all keys and values, (slots, heads, size) each."""
    from engine.kv import BlockCache, span_of

    assert isinstance(cache, BlockCache)
    everything = span_of(torch.arange(6), 0, 6 * BLOCK_TOKENS, torch.device("cpu"))
    return [it.clone() for site in stage.attention_calls for it in cache.read(site, everything)]


@pytest.mark.parametrize("blocks", [(), (0,), (0, 1), (0, 1, 3), (0, -1, 2), (2**40, 0, 1)])
def test_a_block_table_that_does_not_fit_is_refused_before_anything_is_written(
    stage: Stage, hidden: Tensor, blocks: tuple[int, ...]
) -> None:
    cache = stage.new_cache(3)
    expected = stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], cache)[20:]
    table = torch.tensor(blocks, dtype=torch.int64)
    bad = StageRun(start=0, num_tokens=40, rope_length=40, blocks=table)
    good = run(0, 40, 2, 1, 0)
    with pytest.raises(RemoteProtocolError, match="block table"):
        stage.forward(torch.cat([PROMPT] * 2), torch.cat([hidden.flip(0)] * 2), [good, bad], cache)
    rest = stage.forward(PROMPT[20:], hidden[20:], [run(20, 40, 0, 1, 2)], cache)
    assert torch.allclose(rest, expected, atol=1e-4)


def test_it_goes_on_after_a_refused_step(stage: Stage, hidden: Tensor) -> None:
    cache = stage.new_cache(3)
    with pytest.raises(RemoteProtocolError):
        stage.forward(PROMPT, hidden, [run(0, 40, 7)], cache)
    assert stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], cache).isfinite().all()


def test_logits_come_in_float32_a_row_a_token(last: Stage, hidden: Tensor, folder: Path) -> None:
    logits = last.logits(hidden[:5])
    assert logits.shape == (5, VOCAB)
    assert logits.dtype == torch.float32
    assert torch.allclose(last.logits(hidden[2:3]), logits[2:3], atol=1e-4)
    half = load_stage(str(folder), layers=(3, 4), dtype="bfloat16", device="cpu")
    assert half.logits(hidden[:5].bfloat16()).dtype == torch.float32


def test_nan_in_one_sequence_does_not_reach_another(stage: Stage, hidden: Tensor) -> None:
    cache = stage.new_cache(6)
    alone = stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], cache)
    both = stage.forward(
        torch.cat([PROMPT, PROMPT]),
        torch.cat([torch.full_like(hidden, float("nan")), hidden]),
        [run(0, 40, 3, 4, 5), run(0, 40, 0, 1, 2)],
        cache,
    )
    assert both[:40].isnan().all()
    assert torch.allclose(both[40:], alone, atol=1e-4)


def test_blocks_once_poisoned_can_be_used_again(stage: Stage, hidden: Tensor) -> None:
    """A block that held another sequence's NaN: what is not yet written is not read."""
    cache = stage.new_cache(3)
    expected = stage.forward(PROMPT, hidden, [run(0, 40, 0, 1, 2)], cache)
    stage.forward(PROMPT, torch.full_like(hidden, float("nan")), [run(0, 40, 2, 0, 1)], cache)
    again = [
        stage.forward(PROMPT[at : at + 1], hidden[at : at + 1], [run(at, at + 1, 0, 1, 2)], cache)
        for at in range(40)
    ]
    assert torch.allclose(torch.cat(again), expected, atol=1e-4)


def test_the_demo_model_is_what_runs_when_none_is_named() -> None:
    stages = [load_stage(sections=2, index=index, device="cpu") for index in range(2)]
    assert stages[0].end_layer == stages[1].start_layer
    assert stages[0].fingerprint == stages[1].fingerprint
    assert stages[1].is_last
    assert stages[0].read_bytes == stages[0].stage_bytes


def test_a_section_may_be_any_layers(folder: Path) -> None:
    """Balanced or not, the cut does not show in the logits."""
    cuts = [[(0, 4)], [(0, 1), (1, 4)], [(0, 3), (3, 4)], [(0, 2), (2, 3), (3, 4)]]
    results = [cut(folder, it).prefill(PROMPT.tolist()) for it in cuts]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_loading_says_nothing_on_stdout(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A worker's stdout belongs to its ready line."""
    load_stage(str(folder), layers=(0, 2), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_torch_gets_the_threads_it_is_told(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_stage(str(folder), layers=(0, 1), threads=2, device="cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_chain_of_one_layer(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, num_hidden_layers=1)
    chain: Chain = cut(tmp_path, [(0, 1)])
    with torch.no_grad():
        theirs = model(PROMPT[None], use_cache=False).logits[0]
    assert float((chain.prefill(PROMPT.tolist()) - theirs).abs().max()) < 1e-4
