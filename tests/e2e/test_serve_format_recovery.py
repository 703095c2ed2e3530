"""A text under a schema goes on when a worker is lost, as if nothing had happened."""

from __future__ import annotations

from typing import Any

import openai

from tests.support.forked_workers import Nursery
from tests.support.serving import Server

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


def test_a_spare_takes_over_in_the_middle_of_a_text_under_a_schema(tiny: Any) -> None:
    with Nursery() as nursery:
        words = ("--model", str(tiny.folder), "--kv-memory", "16MB", "--sections", "2", "--index")
        workers = [nursery.start(*words, index) for index in ("0", "1", "1")]
        addresses = ",".join(worker.address for worker in workers)
        with (
            Server("--workers", addresses) as server,
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
            # However short it was: a spare needs some hundredths of a second.
            assert server.metric("comboio_pipeline_losses_total") == 1
            assert server.said("going on workers=")
            figures = server.get("/metrics").body.decode()
            assert workers[2].address in figures and workers[1].address not in figures
