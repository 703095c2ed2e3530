"""Run the sequences of one request: in their turn, with a deadline, and gone when nobody waits.

Knows the pipeline and the admission; no HTTP but the errors' numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.encoding import Prompt
from manager.generation import GenerationOptions, Piece
from manager.pace import Pace
from manager.serve.admission import Admission, QueueFull
from manager.serve.errors import ApiError, bad_value, not_ready, translated
from proto.errors import Error

if TYPE_CHECKING:
    from manager.pipeline import Pipeline
    from manager.sequences import Constraint


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sequence of a request."""

    choice: int  # of the answer, that it is
    prompt: Prompt
    options: GenerationOptions
    constraint: Constraint | None = None
    shown: Mapping[int, str] = field(default_factory=dict)  # special tokens that have a text here


@dataclass(slots=True)
class Run:
    """What the sequences of a request need, and when they got it."""

    pipeline: Pipeline
    admission: Admission
    pace: Pace  # of its pieces
    waited_s: float = 0.0  # for the last of the sequences to begin


async def pieces_of(run: Run, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(choice, piece) of all sequences as they come; closing it early frees everything at once.

    Raises:
        ApiError: one cannot run, failed, or took too long.
    """
    try:
        run.admission.reserve(len(wanted))
    except QueueFull as full:
        if len(wanted) > run.admission.places:
            raise bad_value(
                "n",
                f"{len(wanted)} texts in one request; this server has room for "
                f"{run.admission.places}: ask for fewer at once.",
            ) from full
        raise ApiError(
            429,
            f"the queue is full: {run.admission.waiting} texts wait already; try again in "
            f"{full.retry_after_s} s.",
            code="queue_full",
            retry_after_s=full.retry_after_s,
        ) from full
    try:
        one = _one(run, wanted[0]) if len(wanted) == 1 else _merged(run, wanted)
        async with aclosing(one) as pieces:
            async for choice, piece in pieces:
                yield choice, piece
    finally:
        run.admission.give_back(len(wanted))


async def _one(run: Run, wanted: Wanted) -> AsyncGenerator[tuple[int, Piece], None]:
    started_s = asyncio.get_running_loop().time()
    async with run.admission.run():
        run.waited_s = asyncio.get_running_loop().time() - started_s
        stream = run.pipeline.stream(
            wanted.prompt,
            wanted.options,
            constraint=wanted.constraint,
            shown=wanted.shown,
            pace=run.pace,
        )
        try:
            async with aclosing(stream) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if piece.finish_reason in ("error", "cancelled"):
                        raise _failed(run, piece)
                    yield wanted.choice, piece
        except Error as exc:
            raise translated(exc) from exc


def _failed(run: Run, piece: Piece) -> ApiError:
    if piece.finish_reason == "cancelled" or run.pipeline.lost is not None:
        return not_ready(f"the text ended early: {piece.error}")
    return ApiError(500, f"the text could not be generated: {piece.error}", code="failed")


async def _merged(run: Run, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Several at the same time; the first error ends all."""
    # Bounded by what the sequences may generate; a slow reader finds longer pieces.
    arrived: asyncio.Queue[tuple[int, Piece] | ApiError | None] = asyncio.Queue(2 * len(wanted))

    async def follow(one: Wanted) -> None:
        try:
            async with aclosing(_one(run, one)) as pieces:
                async for item in pieces:
                    await arrived.put(item)
            await arrived.put(None)
        except ApiError as exc:
            await arrived.put(exc)

    tasks = [asyncio.ensure_future(follow(one)) for one in wanted]
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if item is None:
                left -= 1
            elif isinstance(item, ApiError):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
