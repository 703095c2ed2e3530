"""A text under a schema goes on when a worker is lost, as if nothing had happened.

On a model whose calls of functions begin and end with special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.adapters import adapted
from tests.support.chains import save_tiny_with_tokenizer
from tests.support.forked_workers import Nursery
from tests.support.serving import Server, until

SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z ]{6,12}$"},
            "minItems": 12,
            "maxItems": 12,
        },
    },
    "required": ["tags"],
    "additionalProperties": False,
}


POEM: Any = {
    "model": "verse",
    "prompt": [5, 9, 40],
    "max_tokens": 12,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
MARKS = ["<call>", "</call>"]  # what stands around a call in the chat template
CLOCK: Any = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["Lisboa", "Bissau"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose calls begin and end with special tokens, and an adapter beside it."""
    folder = tmp_path_factory.mktemp("marked")
    made = save_tiny_with_tokenizer(folder, vocab_size=302, max_position_embeddings=4096)
    made.tokenizer.backend_tokenizer.add_special_tokens(MARKS)
    made.tokenizer.save_pretrained(folder)
    adapted(made.model, folder / "verse")
    return folder


def test_a_spare_takes_over_in_the_middle_of_a_text_under_a_schema(marked: Path) -> None:
    with Nursery() as nursery:
        words = ("--model", str(marked), "--kv-memory", "16MB", "--sections", "2", "--index")
        workers = [nursery.start(*words, index) for index in ("0", "1", "1")]
        addresses = ",".join(worker.address for worker in workers)
        with (
            Server("--workers", addresses, "--adapter", f"verse={marked / 'verse'}") as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
            asked: dict[str, Any] = {
                "model": server.model,
                "messages": [{"role": "user", "content": "some words"}],
                "response_format": wanted,
                "seed": 3,
                "temperature": 1.0,
                "max_tokens": 400,
            }
            check_call(client, server.model)
            verse = client.completions.create(**POEM).choices[0].text
            undisturbed = client.chat.completions.create(**asked).choices[0]
            assert undisturbed.finish_reason == "stop"
            pieces = []
            for event in client.chat.completions.create(**asked, stream=True):
                if not event.choices:
                    continue
                pieces.append(event.choices[0].delta.content or "")
                if len("".join(pieces)) > 8:
                    workers[1].kill()
            assert "".join(pieces) == undisturbed.message.content

            def is_replaced() -> bool:
                figures = server.get("/metrics").body.decode()
                return workers[2].address in figures and workers[1].address not in figures

            until(is_replaced)  # the whole text may have been on its way to a slow reader before
            assert server.metric("comboio_pipeline_losses_total") == 1
            assert server.said("going on workers=")
            # The adapter was this server's own: whoever is new has it now, and the others still.
            assert client.completions.create(**POEM).choices[0].text == verse


def check_call(client: openai.OpenAI, model: str) -> None:
    """One is asked for, and comes: whole, and in a stream."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "what time is it?"}],
        "tools": [CLOCK],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        "max_tokens": 400,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert json.loads(call.function.arguments)["zone"] in ("Lisboa", "Bissau")
    events = [it.choices[0] for it in client.chat.completions.create(**asked, stream=True)]
    assert [it.finish_reason for it in events if it.finish_reason] == ["tool_calls"]
    assert not any(it.delta.content for it in events)
    (streamed,) = [it for event in events for it in event.delta.tool_calls or []]
    assert streamed.function.arguments == call.function.arguments
