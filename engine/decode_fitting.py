"""Choose, at load, how a stage decodes on its GPU: what computes the same as run by run is used.

Three sequences of different lengths are decoded a few tokens far, run by run, all at once and as a
recording is played; keys and values of one token are read by the next, so they are compared as
well. What gives other numbers, or raises, is left out, with a line in the log.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from engine.attention import StageRun
from engine.decode_graphs import DecodeGraphs, Record
from engine.foreign_code import first_line
from engine.kv import BLOCK_TOKENS
from engine.selfcheck import relative_error, tolerance

if TYPE_CHECKING:
    from engine.stage import Stage

log = logging.getLogger("comboio.engine")

_LENGTHS: Final = (5, 19, 34)  # in one, two and three blocks
_STEPS: Final = 3  # the first of them is recorded, the others are played


def fit_decoding(stage: Stage, record: Record | None) -> None:
    """Let a stage decode in the quickest way that agrees.

    Args:
        record: how to record a step; None: not at all.
    """
    if stage.max_context < _LENGTHS[-1] + _STEPS:
        return  # nothing that anybody would want fast
    expected = _decoded(stage)
    why_not = _why_not(stage, expected, at_once=True)
    if why_not is not None:
        log.warning("decode steps attend sequence by sequence on this device: %s", why_not)
        return
    stage.attends_at_once = True
    if record is None:
        return
    graphs = DecodeGraphs(stage, record, recorded_after=0)
    why_not = _why_not(stage, expected, graphs=graphs)
    if why_not is not None:
        if graphs.why_off is None:
            graphs.turn_off(why_not)
        return
    log.info("decode steps are recorded as CUDA graphs")
    stage.graphs = DecodeGraphs(stage, record)


def _why_not(
    stage: Stage, expected: Tensor, *, at_once: bool = False, graphs: DecodeGraphs | None = None
) -> str | None:
    """What is amiss with a way of decoding; None: nothing."""
    before = stage.attends_at_once, stage.graphs
    try:
        stage.attends_at_once, stage.graphs = at_once or before[0], graphs
        found = _decoded(stage)
    except Exception as exc:  # whatever torch raises on a device that lacks something
        return first_line(exc)
    finally:
        stage.attends_at_once, stage.graphs = before
    if graphs is not None and graphs.why_off is not None:
        return graphs.why_off
    count = len(_LENGTHS)
    error = max(relative_error(found[it::count], expected[it::count]) for it in range(count))
    # Not finite is no less wrong than far off.
    return None if error <= tolerance(stage) else f"other numbers (relative error {error:.2g})"


def _decoded(stage: Stage) -> Tensor:
    """(steps * sequences, hidden_size) of some sequences, decoded a few tokens far."""
    generator = torch.Generator().manual_seed(2)
    # Blocks of one sequence lie apart, and in falling order.
    tables = _tables()
    cache = stage.new_cache(sum(map(len, tables)) + 1)
    runs = [
        StageRun(start=0, num_tokens=length, rope_length=length + _STEPS, blocks=table)
        for length, table in zip(_LENGTHS, tables, strict=True)
    ]
    stage.forward(*_given(stage, sum(_LENGTHS), generator), runs, cache)
    results = []
    for step in range(_STEPS):
        runs = [
            replace(run, start=length + step, num_tokens=1)
            for run, length in zip(runs, _LENGTHS, strict=True)
        ]
        results.append(stage.forward(*_given(stage, len(runs), generator), runs, cache))
    return torch.cat(results)


def _tables() -> list[Tensor]:
    needed = [-(-(length + _STEPS) // BLOCK_TOKENS) for length in _LENGTHS]
    blocks = iter(range(sum(needed), 0, -1))
    tables: list[list[int]] = [[] for _ in needed]
    while any(len(table) < count for table, count in zip(tables, needed, strict=True)):
        for table, count in zip(tables, needed, strict=True):
            if len(table) < count:
                table.append(next(blocks))
    return [torch.tensor(table) for table in tables]


def _given(stage: Stage, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and hidden states of so many tokens."""
    ids = torch.randint(stage.vocab_size, (num_tokens,), generator=generator)
    hidden = torch.randn(num_tokens, stage.hidden_size, generator=generator)
    return ids, hidden.to(stage.dtype)
