"""Attention over blocks against the formula, and what is learnt from a model's masks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import masking_utils

from engine import attention, kv, torch_attention
from engine.attention import StageRun, StepContext, block_attention, block_mask, slots_of
from engine.kv import BLOCK_TOKENS, BlockCache, SiteShape
from engine.kv_quantize import quantized, widened
from engine.masks import FULL, MaskNotes, Rule
from proto.errors import ModelUnfit

CPU = torch.device("cpu")
SITE = (0, 0)
RULES = [FULL, Rule("sliding", 1), Rule("sliding", 5), Rule("chunked", 7), Rule("sliding", 10**6)]


class Anything(nn.Module):
    """Stands for the attention module that calls."""


def context(runs: list[StageRun], cache: BlockCache, rule: Rule) -> StepContext:
    step = StepContext(
        runs=runs, cache=cache, device=CPU, slots=slots_of(runs, CPU), rules={SITE: rule}
    )
    step.enter_layer(0)
    return step


def by_the_formula(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: Rule,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One whole sequence: (heads, n, key_size), (kv_heads, n, size) -> (n, heads, value_size)."""
    group = queries.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = queries @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n = queries.shape[1]
    for query in range(n):
        for key in range(n):
            if not sees(rule, query, key):
                scores[:, query, key] = float("-inf")
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, n, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :n]
    return (weights @ values).transpose(0, 1)


def sees(rule: Rule, query: int, key: int) -> bool:
    if key > query:
        return False
    if rule.kind == "sliding":
        return query - key < rule.window
    return rule.kind == "full" or query // rule.window == key // rule.window


@settings(max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    sizes=st.sampled_from([(4, 4), (6, 2), (2, 8)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 39), max_size=3),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    quantize=st.sampled_from(["none", "int8"]),
    scaling=st.sampled_from([None, 0.3]),
    scores=st.sampled_from([16 * 2**20, 64]),
    seed=st.integers(0, 1000),
)
def test_steps_over_blocks_equal_the_formula(
    rule: Rule,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    lengths: list[int],
    cuts: list[int],
    softcap: float | None,
    with_sinks: bool,
    quantize: str,
    scaling: float | None,
    scores: int,
    seed: int,
) -> None:
    """Several sequences, cut into several steps, whatever heads, sizes, windows, caps and sinks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    queries = [random(heads[0], n, sizes[0]) for n in lengths]
    keys = [random(heads[1], n, sizes[0]) for n in lengths]
    values = [random(heads[1], n, sizes[1]) for n in lengths]
    sinks = random(heads[0]) if with_sinks else None
    cache = BlockCache({SITE: SiteShape(heads[1], *sizes)}, 12, torch.float32, CPU, quantize)
    poison(cache, heads[1], sizes)
    blocks = torch.randperm(12, generator=generator)
    out: list[list[Tensor]] = [[] for _ in lengths]
    edges = sorted({0, *cuts, 40})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_attention, "MAX_SCORES", scores)
        patch.setattr(kv, "WIDENED_BYTES", scores)
        for low, high in pairwise(edges):
            part = [(i, low, min(high, n)) for i, n in enumerate(lengths) if low < n]
            if not part:
                continue
            runs = [
                StageRun(
                    start=low, num_tokens=stop - low, rope_length=stop, blocks=blocks[3 * i :][:3]
                )
                for i, low, stop in part
            ]
            with attention.running(context(runs, cache, rule)):
                result, _ = block_attention(
                    Anything(),
                    torch.cat([queries[i][:, a:b] for i, a, b in part], dim=1)[None],
                    torch.cat([keys[i][:, a:b] for i, a, b in part], dim=1)[None],
                    torch.cat([values[i][:, a:b] for i, a, b in part], dim=1)[None],
                    scaling=scaling,
                    softcap=softcap,
                    s_aux=sinks,
                )
            pieces = result[0].split([stop - low for _, low, stop in part])
            for (i, _, _), piece in zip(part, pieces, strict=True):
                out[i].append(piece)
    if quantize == "int8":
        keys, values = ([widened(*quantized(it), it.dtype) for it in of] for of in (keys, values))
    scale = scaling if scaling is not None else sizes[0] ** -0.5
    for i in range(len(lengths)):
        expected = by_the_formula(queries[i], keys[i], values[i], rule, scale, softcap, sinks)
        assert torch.allclose(torch.cat(out[i]), expected, atol=1e-5)


def poison(cache: BlockCache, num_heads: int, sizes: tuple[int, int]) -> None:
    """Fill every slot, so that reading one that was not written shows."""
    slots = torch.arange(cache.num_blocks * BLOCK_TOKENS)
    nan = [torch.full((len(slots), num_heads, size), float("nan")) for size in sizes]
    cache.write(SITE, slots, *nan)


# --- what a model may ask for ----------------------------------------------------------------


def attend(**settings: object) -> None:
    """One token, with what a model passes along besides."""
    cache = BlockCache({SITE: SiteShape(1, 4, 4)}, 1, torch.float32, CPU)
    run = StageRun(start=0, num_tokens=1, rope_length=1, blocks=torch.tensor([0]))
    one = torch.randn(1, 1, 1, 4)
    module = settings.pop("module", Anything())
    assert isinstance(module, nn.Module)
    with attention.running(context([run], cache, FULL)):
        block_attention(module, one, one, one, **settings)  # type: ignore[arg-type]


def test_a_mask_of_its_own_is_refused() -> None:
    with pytest.raises(ModelUnfit, match="Anything makes an attention mask of its own"):
        attend(attention_mask=torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["position_bias", "alibi", "something_new"])
def test_a_tensor_that_would_change_the_result_is_refused(name: str) -> None:
    with pytest.raises(ModelUnfit, match=f"Anything passes '{name}' to its attention"):
        attend(**{name: torch.zeros(1)})


def test_attention_to_later_tokens_is_refused() -> None:
    both_ways = Anything()
    both_ways.is_causal = False  # type: ignore[assignment]
    for settings_ in ({"module": both_ways}, {"is_causal": False}):
        with pytest.raises(ModelUnfit, match="attends to later tokens"):
            attend(**settings_)


def test_what_changes_nothing_is_accepted() -> None:
    attend(
        dropout=0.0,
        is_causal=True,
        position_ids=torch.zeros(1, 1),
        output_attentions=False,
        something_new=None,
        another_flag=True,
    )


# --- masks -----------------------------------------------------------------------------------

MASKS: dict[str, tuple[Callable[..., Tensor], int | None, Rule | None]] = {
    "causal": (masking_utils.causal_mask_function, None, FULL),
    "both ways": (masking_utils.bidirectional_mask_function, None, None),
    **{
        f"window of {n}": (
            masking_utils.sliding_window_causal_mask_function(n),
            n,
            Rule("sliding", n),
        )
        for n in (1, 2, 5, 64, 4096, 131072)
    },
    **{
        f"chunks of {n}": (
            masking_utils.chunked_causal_mask_function(n, torch.zeros(1, dtype=torch.int64)),
            n,
            Rule("chunked", n),
        )
        for n in (2, 5, 64, 8192)
    },
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(5), 5, None),
    "another window than said": (masking_utils.sliding_window_causal_mask_function(5), 6, None),
    "causal, whatever is said": (masking_utils.causal_mask_function, 6, FULL),
    "every second": (lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0), None, None),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_rule_behind_a_mask_is_found(name: str) -> None:
    function, window, rule = MASKS[name]
    notes = MaskNotes()
    marker = notes.marker(function, window, (1, 1, 2, 2))
    assert notes.rule(marker) == rule
    assert notes.rule(marker[:, :, :, :2]) == rule  # as models cut a mask to the keys there are
    assert notes.rule(torch.zeros(1, 1, 2, 2)) is None


@given(
    rule=st.sampled_from([rule for rule in RULES if rule.window < 100]),
    query=st.integers(0, 60),
    key=st.integers(0, 60),
)
def test_rules_mean_what_they_say(rule: Rule, query: int, key: int) -> None:
    assert bool(rule.visible(torch.tensor(query), torch.tensor(key))) == sees(rule, query, key)
    first = next(it for it in range(query + 1) if sees(rule, query, it))
    assert rule.first_visible(query) == first


def test_a_step_makes_no_mask() -> None:
    cache = BlockCache({}, 1, torch.float32, CPU)
    asked = {
        "batch_size": 1,
        "q_length": 2,
        "kv_length": 2,
        "mask_function": masking_utils.causal_mask_function,
    }
    with attention.running(StepContext(runs=[], cache=cache, device=CPU, slots=torch.zeros(0))):
        assert block_mask(**asked) is None  # type: ignore[arg-type]
        with pytest.raises(ModelUnfit, match="a rule of its own"):
            block_mask(**asked, use_vmap=True)  # type: ignore[arg-type]
