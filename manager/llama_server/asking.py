"""Ask a llama-server that is ready, and keep what it answers, also when it has to be asked again.

A single answer streams to stdout and goes to `result_file`; rows of prompts run as in
`manager batch --backend llama-server`. Knows no process: it is told where the server is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from manager.generation import Completion, Piece
from manager.llama_server.api_key import find_api_key
from manager.llama_server.config import LlamaServerConfig
from manager.llama_server.question import Question, check_places, results_path
from manager.llama_server.result_file import write_result, write_whole
from manager.output import Notices, TextWriter
from manager.results import Results, open_results
from proto.errors import Error

if TYPE_CHECKING:
    from manager.llama_server.remote import RemotePipeline

# Of a completion, what its timings say.
MEASURED: Final = (
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "ttft_s",
    "decode_tokens_per_s",
    "latency_s",
)


class Asking:
    """One question, asked until it is answered. A context manager: results are an open file."""

    def __init__(
        self,
        config: LlamaServerConfig,
        question: Question,
        notices: Notices,
        *,
        overwrite: bool = False,
        as_json: bool = False,
    ) -> None:
        """Check where answers go.

        Raises:
            UsageError: they cannot go there.
        """
        check_places(config, question, as_json=as_json)
        self.is_done = question.is_empty
        self._config, self._question, self._notices = config, question, notices
        self._overwrite, self._as_json = overwrite, as_json
        self._results: Results | None = None
        self._shown = _Shown(notices, is_quiet=as_json)
        self._stack = ExitStack()

    def __enter__(self) -> Asking:
        if self._question.rows:
            path = results_path(self._config)
            results = open_results(path, self._question.rows, overwrite=self._overwrite)
            self._results = self._stack.enter_context(results)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.end_line()
        self._stack.__exit__(kind, exc, trace)

    @property
    def kept(self) -> str:
        """What there is of the answers, for a sentence about an early end; "" for nothing."""
        return self._results.kept if self._results is not None and not self.is_done else ""

    async def ask(self, url: str, facts: Mapping[str, Any]) -> None:
        """Ask what has no answer yet.

        Args:
            facts: how the server runs, for the timings.
        Raises:
            Error: the server was lost, or refuses the request; then it may be asked again.
        """
        if self.is_done:
            return
        from manager.llama_server.remote import RemotePipeline

        key = find_api_key(url, self._config.api_key_file, os.environ)
        pipeline = await RemotePipeline.open(
            url,
            api_key=key,
            timeout_s=self._config.request_timeout_s,
            on_progress=self._notices.show,
            on_notice=self._notices.say,
        )
        async with pipeline:
            if self._question.rows:
                await self._ask_rows(pipeline, facts)
            else:
                await self._ask_once(pipeline, facts)
        self.is_done = True

    # --- a single prompt ---------------------------------------------------------------------

    async def _ask_once(self, pipeline: RemotePipeline, facts: Mapping[str, Any]) -> None:
        question = self._question
        asked = (
            pipeline.encode_chat(question.messages)
            if question.messages
            else pipeline.encode(question.text or "")
        )
        self._shown.begin()
        try:
            completion = await pipeline.generate(
                asked, self._config.options, on_piece=self._shown.piece, on_prefill=self._prefill
            )
        finally:
            await self._shown.end()
        if completion.error is not None:
            raise pipeline.lost or Error(completion.error)
        self._shown.end_line()
        timings = {
            **{name: getattr(completion, name) for name in MEASURED},
            **facts,
            **await pipeline.usage(),
        }
        if self._config.result_file is not None:
            write_result(self._config.result_file, completion.text, timings)
        self._publish({"text": completion.text, **timings}, timings)
        self._notices.say(_summary(completion, self._config))

    def _prefill(self, done: int, total: int) -> None:
        if done < total:
            self._notices.show(f"reading the prompt: {done} of {total} tokens", done, total)

    # --- a file of them ----------------------------------------------------------------------

    async def _ask_rows(self, pipeline: RemotePipeline, facts: Mapping[str, Any]) -> None:
        from manager.batch_run import run_rows
        from manager.metrics import summary

        config, rows, results = self._config, self._question.rows, self._results
        assert results is not None
        made_by = {**asdict(config.options), **asdict(self._question.template)}
        results.begin({**pipeline.identity, **made_by})
        num_kept = len(results.done)
        if num_kept:
            self._notices.say(f"going on: {num_kept} of {len(rows)} rows are done already")
        if results.num_changed:
            self._notices.say(f"{results.num_changed} kept rows fit no prompt of the file any more")
        batch_size = config.parallel or self._question.parallel(keep=config.keep)
        measured = await run_rows(
            pipeline,
            rows,
            results,
            batch_size=batch_size,
            iterations=1,
            notices=self._notices,
        )
        report = {
            "prompts": str(config.prompts),
            "rows": len(rows),
            "resumed_rows": num_kept,
            "iterations": 1,
            "batch_size": batch_size,
            "options": asdict(config.options),
            **facts,
            **measured,
        }
        self._notices.say(summary(report))
        self._publish(report, report)
        self.is_done = True
        if results.num_failed:
            where = results_path(config) or "the results"
            raise Error(
                f"{results.num_failed} of {len(rows)} rows failed: {where} has why, row by row"
            )

    # --- both --------------------------------------------------------------------------------

    def _publish(self, printed: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        if self._config.metrics is not None:
            write_whole(
                self._config.metrics, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
            )
        if self._as_json:
            print(json.dumps(printed, ensure_ascii=False), flush=True)


class _Shown:
    """The text on stdout. One that begins again is shown from where it was."""

    def __init__(self, notices: Notices, *, is_quiet: bool) -> None:
        self._notices, self._is_quiet = notices, is_quiet
        self._writer: TextWriter | None = None
        self._text = ""  # of all that was written
        self._expected = ""  # what was written before, and comes again

    def begin(self) -> None:
        """A text begins, perhaps not for the first time."""
        if not self._is_quiet:
            self._expected, self._text = self._text, ""
            self._writer = TextWriter(sys.stdout)

    def piece(self, piece: Piece) -> None:
        """Show what is new of it."""
        if self._writer is None or not piece.text:
            return
        self._notices.clear()  # before text: both may be on one terminal
        before, self._text = self._text, self._text + piece.text
        if not self._expected:
            self._writer.write(piece.text)
        elif self._text.startswith(self._expected):
            self._writer.write(self._text[len(self._expected) :])
            self._expected = ""
        elif not self._expected.startswith(self._text):
            self._writer.write(f"\n{before}{piece.text}")  # another text: all of it
            self._expected = ""

    async def end(self) -> None:
        """All text is out. An early end leaves the line open, for the text to go on."""
        self._notices.clear()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            await writer.close()

    def end_line(self) -> None:
        """The last line is ended; no text follows."""
        text, self._text = self._text, ""
        if text and not text.endswith("\n"):
            try:
                print(flush=True)
            except OSError:
                pass  # nobody reads it


def _summary(completion: Completion, config: LlamaServerConfig) -> str:
    """One line on how it went."""
    parts = [f"{completion.completion_tokens} tokens"]
    if completion.decode_tokens_per_s is not None:
        parts.append(f"{completion.decode_tokens_per_s:.1f} tokens/s")
    if completion.ttft_s is not None:
        parts.append(f"first after {completion.ttft_s:.2f} s")
    if completion.finish_reason == "length":
        parts.append(completion.detail or "cut at max_new_tokens")
    if config.result_file is not None:
        parts.append(f"answer in {config.result_file}")
    return ", ".join(parts)
