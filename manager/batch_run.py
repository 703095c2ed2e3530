"""Run rows over a text server, so many at once, and hand each result over as it comes.

Knows rows, results and the server's requests; no file and no command line. A row that fails has
its error in its result and the others go on; a worker or a disk that is lost ends the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from manager.batch_progress import BatchProgress
from manager.encoding import Encoder
from manager.generation import Completion, Piece
from manager.metrics import Measurement
from manager.output import Notices
from manager.prompts import Row
from manager.results import Result, Results
from proto.errors import Error, RequestRefused, UsageError

if TYPE_CHECKING:
    from manager.text_server import Encodes, TextServer

# Encoding all of a large file only to know how much room to ask for would keep the workers
# waiting, and the longest rows by characters are nearly always the longest by tokens.
ROWS_TO_COUNT: Final = 32
CHARS_PER_TOKEN: Final = 4


async def run_rows(
    server: TextServer,
    rows: Sequence[Row],
    results: Results,
    *,
    batch_size: int,
    iterations: int,
    notices: Notices,
) -> dict[str, Any]:
    """Run what is not done of `rows` once, then all of them `iterations` - 1 times.

    Returns:
        `manager.metrics.Measurement.report` of all of it.
    Raises:
        Error: a worker was lost, or the results' place is full; says what is kept.
    """
    to_do = [row for row in rows if row.index not in results.done]
    num_requests = len(to_do) + (iterations - 1) * len(rows)
    measurement = Measurement(server)
    await measurement.start()
    try:
        with BatchProgress(num_requests, notices) as progress:
            lanes = _Lanes(server, measurement, progress, batch_size)
            await lanes.run(to_do, results)
            await results.finish()
            for _ in range(iterations - 1):
                await lanes.run(rows, None)
        await measurement.stop()
    except Error as exc:
        await results.pause()
        kind = UsageError if isinstance(exc, UsageError) else Error
        raise kind(f"{str(exc).rstrip('.')}; {results.kept}") from exc
    except BaseException:
        await results.pause()
        raise
    finally:
        await measurement.close()
    return measurement.report()


class _Lanes:
    """So many rows at once; whoever is done takes the next row."""

    def __init__(
        self,
        server: TextServer,
        measurement: Measurement,
        progress: BatchProgress,
        batch_size: int,
    ) -> None:
        self._server, self._measurement = server, measurement
        self._progress, self._batch_size = progress, batch_size

    async def run(self, rows: Sequence[Row], results: Results | None) -> None:
        """All of these rows, or until the first error that is not a row's own."""
        waiting = iter(rows)
        lanes = [
            asyncio.ensure_future(self._lane(waiting, results))
            for _ in range(min(self._batch_size, len(rows)))
        ]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _lane(self, waiting: Iterator[Row], results: Results | None) -> None:
        for row in waiting:
            result = await self._run_row(row)
            if results is not None:
                results.add(row, result)
            self._progress.row_done(row.index)

    async def _run_row(self, row: Row) -> Result:
        def count(piece: Piece) -> None:
            tokens = len(piece.token_ids)
            self._progress.tokens_came(row.index, tokens, row.options.max_new_tokens)

        requests = self._measurement.requests
        try:
            # A plain text is left to the server; a pipeline encodes long ones off the event loop.
            prompt = row.prompt if row.messages is None else encode(self._server, row)
            completion = await self._server.generate(prompt, row.options, on_piece=count)
        except RequestRefused as exc:
            requests.failed += 1
            await asyncio.sleep(0)  # a thousand of them in a row must not hold up the rest
            return result_of(row, None, str(exc))
        if completion.error is not None and self._server.lost is not None:
            raise self._server.lost  # not this row's fault: it runs again when the batch goes on
        requests.add(completion)
        return result_of(row, completion, completion.error)


def encode(encoder: Encodes, row: Row) -> Any:
    """A row, as the server takes it: of an encoder, its tokens.

    Raises:
        RequestRefused: there are none.
        UsageError: it is a conversation, and the model has no chat template.
    """
    if row.messages is not None:
        return encoder.encode_chat(row.messages)
    assert row.prompt is not None
    return encoder.encode(row.prompt)


def longest(rows: Sequence[Row], encoder: Encoder) -> int:
    """Tokens of the longest row, prompt and generated together, nearly always.

    Raises:
        UsageError: a row is a conversation, and the model has no chat template.
    """
    largest_first = sorted(rows, key=_likely_tokens, reverse=True)
    conversation = next((row for row in rows if row.messages is not None), None)
    found = max(row.options.max_new_tokens for row in rows) + 1
    for row in [*largest_first[:ROWS_TO_COUNT], *([conversation] if conversation else [])]:
        try:
            num_tokens = len(encode(encoder, row).token_ids)
        except RequestRefused:
            continue  # its result will say so
        found = max(found, num_tokens + row.options.max_new_tokens)
    return found


def result_of(row: Row, completion: Completion | None, error: str | None) -> Result:
    """A line of the results. Without a completion the row never ran."""
    asked: Result = {"prompt": row.prompt}
    if row.messages is not None:
        asked = {"messages": row.messages}
    if row.options.adapter is not None:
        asked["adapter"] = row.options.adapter
    result: Result = {"index": row.index, "id": row.id, **asked, "text": ""}
    if completion is None:
        return {**result, "finish_reason": "error", **dict.fromkeys(MEASURED), "error": error}
    measured = {name: getattr(completion, name) for name in MEASURED}
    return {
        **result,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        **measured,
        "error": error,
    }


MEASURED: Final = (
    "prompt_tokens",
    "completion_tokens",
    "latency_s",
    "ttft_s",
    "decode_tokens_per_s",
)


def _likely_tokens(row: Row) -> int:
    texts = [row.prompt or "", *(message["content"] for message in row.messages or ())]
    return sum(map(len, texts)) // CHARS_PER_TOKEN + row.options.max_new_tokens
