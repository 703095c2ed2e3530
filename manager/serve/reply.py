"""Write an answer to HTTP, whole or as a stream of events; stop at once when the client goes away.

Knows ASGI and the accounts that are kept of a request; nothing of models.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Final, TypeVarTuple

from starlette.types import Receive, Scope, Send

from manager.event_loop import hear
from manager.serve.answers import event
from manager.serve.door import refuse
from manager.serve.errors import ApiError
from manager.serve.generating import Run, pieces_of
from manager.serve.live import Live
from manager.serve.log import Log
from manager.serve.metrics import Metrics
from manager.serve.service import Work
from manager.serve.traces import RequestTraces

Parts = TypeVarTuple("Parts")

# So many log-probabilities become JSON in some milliseconds.
INLINE_NUMBERS: Final = 4096

CLIENT_GONE: Final = 499  # as nginx counts it; nobody reads it

EVENT_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies pass each event on at once
]
JSON_HEADERS: Final = [(b"content-type", b"application/json")]


class Account:
    """What is written down of one request."""

    def __init__(self, endpoint: str, request_id: str, metrics: Metrics, log: Log) -> None:
        self.endpoint, self.request_id = endpoint, request_id
        self._metrics, self._log = metrics, log
        self.started_s = time.monotonic()
        self.first_s: float | None = None  # its first token
        self.num_tokens = 0
        self.waited_s: float | None = None
        self.live: Live | None = None  # counts tokens as well
        self.traces: RequestTraces | None = None

    def tokens(self, number: int) -> None:
        """So many came."""
        if number and self.first_s is None:
            self.first_s = time.monotonic()
        self.num_tokens += number
        if self.live is not None:
            self.live.generated += number

    def end(self, status: int, work: Work | None, error: ApiError | None) -> None:
        """It is over."""
        now_s = time.monotonic()
        metrics = self._metrics
        metrics.requests.labels(self.endpoint, str(status)).inc()
        metrics.request_seconds.labels(self.endpoint).observe(now_s - self.started_s)
        ttft_s = None
        if work is not None:
            metrics.prompt_tokens.inc(work.answer.prompt_tokens)
            metrics.generated_tokens.inc(self.num_tokens)
        if self.first_s is not None:
            ttft_s = self.first_s - self.started_s
            metrics.ttft_seconds.observe(ttft_s)
            longest = max((it.num_tokens for it in work.answer.choices), default=0) if work else 0
            if longest > 1:
                metrics.token_seconds.observe((now_s - self.first_s) / (longest - 1))
        if self.traces is not None:
            self.traces.request_ended(self.request_id, self.started_s, self.first_s, now_s)
        self._log(
            "request",
            id=self.request_id,
            endpoint=self.endpoint,
            status=status,
            adapter=None if work is None else work.adapter,
            stream=None if work is None else work.streams,
            texts=None if work is None else len(work.answer.choices),
            prompt_tokens=None if work is None else work.answer.prompt_tokens,
            tokens=self.num_tokens,
            waited_s=self.waited_s,
            ttft_s=ttft_s,
            seconds=now_s - self.started_s,
            error=None if error is None else error.message,
        )


class Reply:
    """Runs a request and writes its answer."""

    def __init__(self, work: Work, run: Run, timeout_s: float, account: Account) -> None:
        self._work, self._run, self._timeout_s = work, run, timeout_s
        self._account = account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until the answer is written, or nobody reads it."""
        status, error = 200, None
        sent = Sent(send)
        write = self._stream if self._work.streams else self._whole
        try:
            if not await unless_gone(receive, lambda: self._in_time(write, sent)):
                status = CLIENT_GONE
        except ApiError as exc:
            status, error = exc.status, exc
            await self._fail(sent, exc)
        finally:
            self._account.waited_s = self._run.waited_s
            self._account.end(status, self._work, error)

    async def _in_time(self, write: Callable[[Sent], Awaitable[None]], sent: Sent) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await write(sent)
        except TimeoutError as exc:
            raise ApiError(
                504,
                f"the request took longer than {self._timeout_s:g} s; it had "
                f"{self._account.num_tokens} tokens: ask for fewer, or stream.",
                code="timeout",
            ) from exc

    async def _whole(self, sent: Sent) -> None:
        answer = self._work.answer
        if self._work.wanted:
            async with aclosing(pieces_of(self._run, self._work.wanted)) as pieces:
                async for index, piece in pieces:
                    self._account.tokens(len(piece.token_ids))
                    answer.add(index, piece)
        body = await self._made(answer.whole)
        length = (b"content-length", str(len(body)).encode())
        await sent.start(200, [*JSON_HEADERS, length])
        await sent.body(body, more=False)

    async def _stream(self, sent: Sent) -> None:
        answer, account, wanted = self._work.answer, self._account, self._work.wanted
        left = len(wanted)
        if not left:
            await sent.start(200, EVENT_HEADERS)
            await sent.body(answer.opening() + answer.closing(), more=False)
            return
        async with aclosing(pieces_of(self._run, wanted)) as pieces:
            async for index, piece in pieces:
                account.tokens(len(piece.token_ids))
                if piece.prompt_logprobs is None:
                    said = answer.events(index, piece)
                else:
                    said = await self._made(answer.events, index, piece)
                if not sent.has_started:  # an error before the first piece has its own status
                    await sent.start(200, EVENT_HEADERS)
                    said = answer.opening() + said
                left -= piece.finish_reason is not None
                if not left:
                    said += answer.closing()
                if said:
                    await sent.body(said, more=left > 0)

    async def _made(self, make: Callable[[*Parts], bytes], *args: *Parts) -> bytes:
        """A part of the answer; on a thread where prompts make it long."""
        if self._work.answer.num_echoed < INLINE_NUMBERS:
            return make(*args)
        return await asyncio.to_thread(make, *args)

    async def _fail(self, sent: Sent, error: ApiError) -> None:
        if not sent.has_started:
            await refuse(sent.send, error)
        elif not sent.is_done:
            # The status is out already: the error is the stream's last event.
            await sent.body(event(error.body), more=False)


class Sent:
    """How far an answer is written."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.has_started = self.is_done = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status and headers."""
        self.has_started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, body: bytes, *, more: bool = True) -> None:
        """More of the body; waits while the client reads slowly."""
        self.is_done = not more
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Do the work, or leave it as soon as the client goes away; True when it is done.

    The work runs in the caller's own task, so that a request is on its way to the workers before
    the next one is read.
    """
    task = asyncio.current_task()
    assert task is not None
    is_gone, before = False, task.cancelling()

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    watching.add_done_callback(hear)
    try:
        await work()
        return True
    except asyncio.CancelledError:
        if is_gone and task.uncancel() <= before:
            return False
        raise  # somebody else wants this task to end
    finally:
        # Not waited for: what is written down of a request is there before its client can ask.
        watching.cancel()
