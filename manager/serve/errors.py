"""Errors of the API, in OpenAI's shape: a status, a type, a code, and one sentence.

Pure. Knows HTTP's numbers and the project's own errors; no server.
"""

from __future__ import annotations

from typing import Any, Final

from proto.errors import Error, UsageError

KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a request with a status of 400 or more."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        if self.retry_after_s is not None:
            return {"retry-after": str(self.retry_after_s)}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def bad_value(param: str | None, message: str, code: str | None = None) -> ApiError:
    """The request says something that cannot be."""
    return ApiError(400, message, param=param, code=code)


def not_ready(reason: str, retry_after_s: int = 1) -> ApiError:
    """Nothing can be generated now."""
    return ApiError(503, reason, code="not_ready", retry_after_s=retry_after_s)


def translated(error: Error) -> ApiError:
    """One of the project's errors, as the client hears of it."""
    if isinstance(error, UsageError):  # a request that can never run, an adapter that is not there
        return bad_value(None, str(error))
    return not_ready(str(error))
