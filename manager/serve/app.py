"""The application: which path does what. Handlers read a request, check it, and hand over a reply.

Knows HTTP; what a request means stands in `manager.serve.service`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from manager.pace import AT_ONCE, Pace
from manager.serve.admission import Admission
from manager.serve.answers import encode, event
from manager.serve.config import ServeConfig
from manager.serve.door import Door, refuse
from manager.serve.errors import ApiError
from manager.serve.generating import Run
from manager.serve.keeper import Keeper, State
from manager.serve.live import Live
from manager.serve.log import Log
from manager.serve.metrics import Metrics, Seen
from manager.serve.openapi import document
from manager.serve.reply import EVENT_HEADERS, Account, Reply, Sent, unless_gone
from manager.serve.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_body,
)
from manager.serve.service import Service, Work
from proto.errors import Error

if TYPE_CHECKING:
    from manager.serve.traces import RequestTraces

PAGE: Final = "manager.serve.page"
ASSET_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "webmanifest": "application/manifest+json",
}
# Nothing but the page's own files: what a model writes cannot load or run anything.
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Api:
    """The server's endpoints and what they share."""

    def __init__(
        self,
        config: ServeConfig,
        keeper: Keeper,
        log: Log,
        traces: RequestTraces | None = None,
    ) -> None:
        limits = config.limits
        self._config, self._keeper, self._log = config, keeper, log
        self._traces = traces
        self.admission = admission = Admission(limits.max_concurrent, limits.max_queue)
        most = config.stream_events
        self._pace = Pace(lambda: admission.running / most) if most else AT_ONCE
        self.metrics = Metrics(keeper, self.admission)
        self.live = Live(keeper, self.admission)
        self._service = Service(keeper)
        self.closing = asyncio.Event()  # ends what would never end by itself

    def app(self, api_keys: tuple[str, ...]) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/live", self.watch, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/", self.page, methods=["GET"]),
            Route("/assets/{name}", self.asset, methods=["GET"]),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _on_api_error,
                HTTPException: _on_http_error,
                Exception: self._on_fault,
            },
        )
        app.router.redirect_slashes = False
        return Door(
            app,
            api_keys=api_keys,
            origins=self._config.cors_origins,
            is_local=self._config.is_local,
            body_bytes=self._config.limits.body_bytes,
        )

    # --- texts -------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Any:
        """POST /v1/completions."""
        return await self._generate(
            "completions", request, CompletionRequest, self._service.completion
        )

    async def chat(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        return await self._generate("chat", request, ChatRequest, self._service.chat)

    async def _generate(
        self,
        endpoint: str,
        request: Request,
        kind: type[Body],
        prepare: Callable[[Body, str], Awaitable[Work]],
    ) -> Reply:
        request_id = request.state.request_id
        account = Account(endpoint, request_id, self.metrics, self._log)
        try:
            work = await prepare(read_body(kind, await _body(request)), request_id)
            run = Run(self._keeper.ready_pipeline(), self.admission, self._pace)
        except ApiError as exc:
            account.end(exc.status, None, exc)
            raise
        account.live, account.traces = self.live, self._traces
        return Reply(work, run, self._config.limits.request_timeout_s, account)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = read_body(TokenizeRequest, await _body(request))
        return _json(await self._service.tokenize(body))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = read_body(DetokenizeRequest, await _body(request))
        return _json(await self._service.detokenize(body))

    # --- what there is -----------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": await self._models()})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        wanted = request.path_params["model"]
        for model in await self._models():
            if model["id"] == wanted:
                return _json(model)
        raise ApiError(
            404, f"the model {wanted[:200]!r} does not exist here.", code="model_not_found"
        )

    async def _models(self) -> list[dict[str, Any]]:
        names = await self._service.models()
        pipeline = self._keeper.ready_pipeline()
        return [
            {
                "id": name,
                "object": "model",
                "created": int(self._started_s),
                "owned_by": "comboio",
                "parent": None if name == pipeline.model_name else pipeline.model_name,
                "max_model_len": pipeline.max_context,
                "chat": pipeline.has_chat_template,
            }
            for name in names
        ]

    _started_s = time.time()

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when a request would run now."""
        reason = self._keeper.reason
        said = {"status": self._keeper.state.value, "reason": reason}
        return _json(said, status=200 if reason is None else 503)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        pipeline = self._keeper.pipeline
        seen: Seen = []
        addresses: tuple[str, ...] = ()
        stats = None
        if pipeline is not None and pipeline.lost is None:
            stats = pipeline.stats()
            try:
                seen, addresses = await pipeline.status(), pipeline.addresses
            except Error:
                pass  # without the workers' numbers
        text = self.metrics.exposition(seen, addresses, stats)
        return Response(text, media_type=self.metrics.content_type)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(document())

    async def watch(self, request: Request) -> Any:
        """GET /live: the workers and the queue, as events."""
        if self.live.is_full:
            raise ApiError(429, "too many watch already.", retry_after_s=10)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            sent = Sent(send)

            async def show() -> None:
                await sent.start(200, EVENT_HEADERS)
                async with aclosing(self.live.watch()) as snapshots:
                    async for snapshot in snapshots:
                        await sent.body(event(snapshot))

            async def until_closing() -> None:
                showing = asyncio.ensure_future(show())
                closing = asyncio.ensure_future(self.closing.wait())
                try:
                    await asyncio.wait({showing, closing}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    showing.cancel()
                    closing.cancel()
                    await asyncio.gather(showing, closing, return_exceptions=True)
                if self.closing.is_set():
                    await sent.body(b"", more=False)

            await unless_gone(receive, until_closing)

        return answer

    # --- the page ----------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """GET /."""
        return _asset("index.html")

    async def asset(self, request: Request) -> Response:
        """GET /assets/{name}."""
        return _asset(request.path_params["name"])

    async def _on_fault(self, request: Request, exc: Exception) -> Any:
        """Our own mistake: said in the log, and nothing of it to the client."""
        self._log("fault", id=request.state.request_id, error=f"{type(exc).__name__}: {exc}")
        return await _on_api_error(
            request, ApiError(500, "a fault in the server; its log says more.", code="fault")
        )

    @property
    def is_ready(self) -> bool:
        """Whether requests run."""
        return self._keeper.state is State.READY


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as exc:
        raise ApiError(400, "the request ended in its middle.") from exc


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


def _asset(name: str) -> Response:
    kind = ASSET_KINDS.get(name.rpartition(".")[2])
    file = resources.files(PAGE) / name
    if kind is None or "/" in name or name.startswith(".") or not file.is_file():
        raise ApiError(404, f"there is no {name[:100]!r} here.")
    headers = {
        "content-security-policy": PAGE_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(file.read_bytes(), media_type=kind, headers=headers)


async def _on_api_error(request: Request, exc: Exception) -> Any:
    assert isinstance(exc, ApiError)
    error = exc

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(send, error)

    return answer


async def _on_http_error(request: Request, exc: Exception) -> Any:
    assert isinstance(exc, HTTPException)
    path, method = request.url.path[:200], request.method
    message = f"{method} {path}: {exc.detail}"
    if exc.status_code == 404:
        message = f"there is no {path} here; see /openapi.json."
    elif exc.status_code == 405:
        message = f"{path} does not take {method}."
    return await _on_api_error(request, ApiError(exc.status_code, message))
