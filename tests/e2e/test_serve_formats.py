"""Texts that follow a schema, and calls of functions, on a model that knows neither."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.serving import Server

SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["fox", "dog"]}, "maxItems": 3},
        "name": {"type": "string", "maxLength": 5},
    },
    "required": ["age", "tags", "name"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Porto", "Lisboa"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
MESSAGES: Any = [{"role": "user", "content": "the weather in Porto?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, server: Server, **values: Any) -> Any:
    asked = {"max_tokens": 400, "temperature": 1.0, "seed": 3, **values}
    return client.chat.completions.create(model=server.model, messages=MESSAGES, **asked)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_follows_its_schema(client: openai.OpenAI, server: Server, seed: int) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    done = ask(client, server, response_format=wanted, seed=seed)
    made = json.loads(done.choices[0].message.content)
    assert done.choices[0].finish_reason == "stop"
    assert set(made) == {"age", "tags", "name"} and 0 <= made["age"] <= 120
    assert set(made["tags"]) <= {"fox", "dog"} and len(made["tags"]) <= 3
    assert len(made["name"]) <= 5


def test_choices_and_streams_follow_it_too_beside_free_texts(
    client: openai.OpenAI, server: Server
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    done = ask(client, server, response_format=wanted, n=3)
    texts = [choice.message.content for choice in done.choices]
    assert len(set(texts)) == 3 and all(json.loads(text) for text in texts)
    stream = ask(client, server, response_format=wanted, stream=True)
    said = "".join(it.choices[0].delta.content or "" for it in stream if it.choices)
    assert said == texts[0]
    free = client.completions.create(model=server.model, prompt=[5, 9], max_tokens=8, temperature=0)
    assert not free.choices[0].text.startswith("{")


def test_any_object_is_json(client: openai.OpenAI, server: Server) -> None:
    got = ask(client, server, response_format={"type": "json_object"}, max_tokens=60)
    assert got.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"type": "objec"}, "objec"), ({"$ref": "#/nowhere"}, "cannot be followed")],
)
def test_a_schema_that_is_none_is_refused(
    server: Server, schema: dict[str, Any], words: str
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": MESSAGES, "response_format": wanted}
    got = server.post("/v1/chat/completions", body)
    assert got.status == 400 and words in got.error
    assert got.json["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
def test_a_call_that_is_asked_for_comes_with_arguments_that_fit(
    client: openai.OpenAI, server: Server, choice: Any
) -> None:
    tools = [WEATHER] if choice != "required" else [WEATHER, CLOCK]
    done = ask(client, server, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    message = done.choices[0].message
    assert done.choices[0].finish_reason == "tool_calls" and message.content is None
    assert len(message.tool_calls) == 1
    called = message.tool_calls[0].function
    arguments = json.loads(called.arguments)
    if called.name == "weather":
        assert arguments["place"] in ("Porto", "Lisboa") and arguments["days"] in (1, 2, 3)
    else:
        assert called.name == "clock" and arguments == {}


def test_a_call_streams_as_a_call(client: openai.OpenAI, server: Server) -> None:
    chunks = list(
        ask(
            client,
            server,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            stream=True,
        )
    )
    calls = [it.choices[0].delta.tool_calls for it in chunks if it.choices[0].delta.tool_calls]
    assert len(calls) == 1 and calls[0][0].index == 0 and calls[0][0].id
    assert calls[0][0].function.name == "weather"
    assert json.loads(calls[0][0].function.arguments)["place"] in ("Porto", "Lisboa")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(it.choices[0].delta.content for it in chunks)


def test_a_model_that_may_call_may_also_talk(client: openai.OpenAI, server: Server) -> None:
    done = ask(client, server, tools=[WEATHER], max_tokens=20)
    assert done.choices[0].message.tool_calls is None and done.choices[0].message.content


def test_a_turn_with_a_call_and_its_result_goes_on(client: openai.OpenAI, server: Server) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Porto", "days": 1}'},
    }
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    done = client.chat.completions.create(
        model=server.model, messages=messages, tools=[WEATHER], max_tokens=5, temperature=0
    )
    assert done.choices[0].message.content
    call["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="arguments that are no JSON"):
        client.chat.completions.create(model=server.model, messages=messages, max_tokens=5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "names none of the tools (weather)"),
        ({"tools": [{**WEATHER, "type": "web"}]}, "of type 'web'"),
    ],
)
def test_tools_that_cannot_be_are_refused(
    server: Server, values: dict[str, Any], words: str
) -> None:
    got = server.post("/v1/chat/completions", {"messages": MESSAGES, **values})
    assert got.status == 400 and words in got.error
