"""What every request passes on its way in: its id, its API key, where it came from, its size.

A plain ASGI layer around the application. Keys are compared in constant time and never logged.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manager.addresses import is_loopback
from manager.serve.errors import ApiError
from proto.address import Address

# The page and what tells a load balancer are for everybody; they say nothing of anybody's texts.
OPEN_PATHS: Final = ("/", "/health", "/favicon.ico", "/openapi.json")
OPEN_FOLDER: Final = "/assets/"
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class Door:
    """Lets requests in, or answers them with an error."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        origins: Sequence[str],
        is_local: bool,
        body_bytes: int,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._origins = frozenset(origin.rstrip("/") for origin in origins)
        self._is_local, self._body_bytes = is_local, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        said = headers.get("x-request-id", "")
        request_id = said if REQUEST_ID.match(said) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        more = [(b"x-request-id", request_id.encode())]
        origin = headers.get("origin", "").rstrip("/")
        if origin in self._origins:
            more += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"origin")]

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            if origin in self._origins and _is_preflight(scope, headers):
                await _answer_preflight(send_marked)
                return
            self._check(scope, headers, origin)
            await self._app(scope, self._bounded(receive), send_marked)
        except ApiError as exc:
            await refuse(send_marked, exc)

    def _check(self, scope: Scope, headers: Headers, origin: str) -> None:
        """Raises ApiError where the request may not come in."""
        if not self._keys and self._is_local:
            # A page of another site must not use a server that trusts this machine, neither by
            # its name nor by having its own name point here.
            host = headers.get("host", "")
            if not _is_here(host):
                raise ApiError(403, f"the host {host[:100]!r} is not this machine: call 127.0.0.1.")
        if origin and origin not in self._origins and not _is_same(origin, headers):
            raise ApiError(
                403,
                f"pages from {origin[:100]} may not call this server: start it with "
                "--cors-origin to let them.",
            )
        path = scope["path"]
        if self._keys and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body_bytes:
            raise self._too_large()

    def _check_key(self, authorization: str) -> None:
        kind, _, said = authorization.partition(" ")
        key = said.strip().encode("utf-8", "replace")
        fits = [hmac.compare_digest(key, it) for it in self._keys]  # all, whichever fits
        if kind.lower() != "bearer" or not any(fits):
            raise ApiError(
                401,
                "no API key, or none that this server knows: send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )

    def _bounded(self, receive: Receive) -> Receive:
        """The same, up to the largest body."""
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._body_bytes:
                    raise self._too_large()
            return message

        return receive_bounded

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request has more than {self._body_bytes} bytes.", code="request_too_large"
        )


async def refuse(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    body = msgspec.json.encode(error.body)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


@lru_cache(maxsize=64)  # every request of a client has the same
def _is_here(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that do not close
        return False
    return is_loopback(Address(name, 0))


def _is_same(origin: str, headers: Headers) -> bool:
    """Whether a page of this very server asks."""
    return origin.partition("://")[2] == headers.get("host", "")


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


async def _answer_preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
