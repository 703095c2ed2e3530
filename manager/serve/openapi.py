"""The OpenAPI document: bodies as the code checks them, paths as the application has them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec

from manager.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

REFERENCE: Final = "#/components/schemas/{name}"
BODIES: Final = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
ERRORS: Final = {
    "400": "The request says something that cannot be.",
    "401": "No API key, or an unknown one.",
    "403": "It came from a place that may not call this server.",
    "404": "There is no such model.",
    "413": "The request is too large.",
    "429": "The queue is full; Retry-After says when to come back.",
    "500": "A fault in the server, or of the computation.",
    "503": "Nothing can be generated now; the message says why.",
    "504": "The request took too long.",
}


@cache
def document() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    _, components = msgspec.json.schema_components(BODIES, ref_template=REFERENCE)
    components["Error"] = _object(
        error=_object(
            message={"type": "string"},
            type={"type": "string"},
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    )
    components["Usage"] = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
    components["Model"] = _object(
        id={"type": "string"}, object={"const": "model"}, created=COUNT, owned_by={"type": "string"}
    )
    components["Logprobs"] = _logprobs()
    components["Completion"] = _generated(
        "text_completion",
        text={"type": "string"},
        logprobs={"anyOf": [_ref("Logprobs"), {"type": "null"}]},
    )
    components["ChatCompletion"] = _generated("chat.completion", message={"type": "object"})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Comboio",
            "version": "1",
            "description": "A language model over several machines, behind OpenAI's API.",
        },
        "security": [{}, {"key": []}],
        "paths": _paths(),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


COUNT: Final = {"type": "integer", "minimum": 0}


def _paths() -> dict[str, Any]:
    models = _object(object={"const": "list"}, data={"type": "array", "items": _ref("Model")})
    tokens = _object(tokens={"type": "array", "items": COUNT}, count=COUNT, max_model_len=COUNT)
    health = _object(
        status={"enum": ["loading", "ready", "lost", "draining"]},
        reason={"type": ["string", "null"]},
    )
    return {
        "/v1/completions": _post("CompletionRequest", _ref("Completion"), streams=True),
        "/v1/chat/completions": _post("ChatRequest", _ref("ChatCompletion"), streams=True),
        "/tokenize": _post("TokenizeRequest", tokens),
        "/detokenize": _post("DetokenizeRequest", _object(prompt={"type": "string"})),
        "/v1/models": _get(_json(models)),
        "/v1/models/{model}": _get(_json(_ref("Model")), "model"),
        "/health": {
            "get": {
                "summary": "Whether a request would run now.",
                "responses": {
                    "200": {"description": "It would.", **_json(health)},
                    "503": {"description": "It would not.", **_json(health)},
                },
            }
        },
        "/metrics": _get({"content": {"text/plain": {"schema": {"type": "string"}}}}),
        "/openapi.json": _get(_json({"type": "object"})),
    }


def _post(body: str, answer: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "requestBody": {"required": True, **_json(_ref(body))},
            "responses": {"200": {"description": "Done.", "content": content}, **_errors()},
        }
    }


def _get(content: dict[str, Any], *parameters: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "responses": {"200": {"description": "It is here.", **content}, **_errors()}
    }
    if parameters:
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ]
    return {"get": made}


def _errors() -> dict[str, Any]:
    return {
        status: {"description": text, **_json(_ref("Error"))} for status, text in ERRORS.items()
    }


def _logprobs() -> dict[str, Any]:
    """Of a completion; the first token of an echoed prompt has null for a number."""
    number: dict[str, Any] = {"type": ["number", "null"], "maximum": 0}
    top = {"type": ["object", "null"], "additionalProperties": {"type": "number", "maximum": 0}}
    return _object(
        tokens={"type": "array", "items": {"type": "string"}},
        token_logprobs={"type": "array", "items": number},
        top_logprobs={"type": ["array", "null"], "items": top},
        text_offset={"type": "array", "items": COUNT},
    )


def _generated(kind: str, **parts: Any) -> dict[str, Any]:
    choice = _object(index=COUNT, **parts, finish_reason={"enum": ["stop", "length", "tool_calls"]})
    return _object(
        id={"type": "string"},
        object={"const": kind},
        created=COUNT,
        model={"type": "string"},
        choices={"type": "array", "items": choice},
        usage=_ref("Usage"),
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=name)}
