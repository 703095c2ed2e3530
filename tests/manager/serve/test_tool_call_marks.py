"""Calls whose marks are special tokens, which have no text: as models of three families write them.

A model that draws any token that its grammar allows stands for a trained one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from manager.encoding import Prompt
from manager.generation import GenerationOptions
from manager.sequences import ActiveSequence
from manager.serve.answers import ChatAnswer
from manager.serve.grammar import Grammars
from manager.serve.requests import ChatRequest, read_body
from manager.serve.tools import ToolPlan, Tools
from manager.text import Vocabulary
from tests.support.tokenizers import byte_level_tokenizer

HEAD = "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}"
TAIL = "<|end|>{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
QWEN = (
    HEAD + '{% for c in m.tool_calls %}{{ \'\\n\' if not loop.first }}<tool_call>\n{"name": "'
    '{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}" + TAIL
)
MISTRAL = (
    HEAD + "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}{{ ', ' if not loop.last }}{% endfor %}]" + TAIL
)
LLAMA = (
    HEAD + "{% if m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}"
    '<|python_tag|>{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eom|>" + TAIL.removeprefix("<|end|>")
)
MARKS = {
    "qwen": (QWEN, ["<tool_call>", "</tool_call>"]),
    "mistral": (MISTRAL, ["[TOOL_CALLS]"]),
    "llama": (LLAMA, ["<|python_tag|>", "<|eom|>"]),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Porto", "Évora 🚂"]}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    }
]


@dataclass(frozen=True)
class Model:
    """A tokenizer, and the tokens that end its texts."""

    tokenizer: Any
    eos: list[int]
    begin: int  # the token that begins a call

    def plan(self, **values: Any) -> ToolPlan:
        asked = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, **values}
        return Tools(self.tokenizer).plan(read_body(ChatRequest, json.dumps(asked).encode()))


@pytest.fixture(params=MARKS)
def model(request: pytest.FixtureRequest) -> Model:
    template, marks = MARKS[request.param]
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = template
    # As tokenizer.json has them: special, but none that config or tokenizer know by a role.
    tokenizer.backend_tokenizer.add_special_tokens(marks)
    ids = tokenizer.convert_tokens_to_ids(marks)
    assert not set(ids) & set(tokenizer.all_special_ids)
    eos = [tokenizer.eos_token_id, *ids[1:]] if "<|eom|>" in marks else [tokenizer.eos_token_id]
    return Model(tokenizer, eos, ids[0])


Choose = Callable[[int, list[int]], int]


async def drawn(model: Model, plan: ToolPlan, choose: Choose, *, at_once: bool) -> Any:
    """The choice of an answer that this model writes."""
    vocab_size = len(model.tokenizer)
    assert plan.grammar is not None
    grammars = Grammars(model.tokenizer, vocab_size, model.eos)
    constraint = await grammars.constraint(plan.grammar, "tools")
    sequence = ActiveSequence(
        *(0, Prompt((5,)), GenerationOptions(), Vocabulary(model.tokenizer), 0.0),
        constraint=constraint,
        shown=plan.marks,
    )
    answer = ChatAnswer("x", "m", 1, 1, readers=[plan.reader()])
    pieces = sequence.pieces()
    for count in range(400):
        mask = constraint.mask()
        allowed = [it for it in range(vocab_size) if mask[it // 8] >> it % 8 & 1]
        token = choose(count, allowed)
        if token in model.eos:
            break
        sequence.token_came(token, None, 0.0)
        if not at_once:
            answer.add(0, await anext(pieces))
    sequence.finish("stop", now_s=0.0)
    answer.add(0, await anext(pieces))
    return json.loads(answer.whole())["choices"][0]


def at_random(model: Model, seed: int, *, ends_early: bool = True) -> Choose:
    draws = random.Random(seed)

    def choose(count: int, allowed: list[int]) -> int:
        ends = [it for it in allowed if it in model.eos]
        others = [it for it in allowed if it not in ends]
        return ends[0] if ends and (ends_early or not others) else draws.choice(others)

    return choose


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "token by token"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_call_is_read_though_its_marks_have_no_text(
    model: Model, seed: int, at_once: bool
) -> None:
    plan = model.plan(tool_choice="required", parallel_tool_calls=False)
    choice = await drawn(model, plan, at_random(model, seed), at_once=at_once)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    arguments = json.loads(call["function"]["arguments"])
    assert list(arguments) == ["place"] and arguments["place"] in ("Porto", "Évora 🚂")


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "token by token"])
async def test_text_before_a_call_stays_before_it(model: Model, at_once: bool) -> None:
    plan = model.plan()
    spoken = model.tokenizer("a fox 🚂", add_special_tokens=False)["input_ids"]
    calling = at_random(model, 1)

    def choose(count: int, allowed: list[int]) -> int:
        if count < len(spoken):
            return int(spoken[count])
        return model.begin if count == len(spoken) else calling(count, allowed)

    choice = await drawn(model, plan, choose, at_once=at_once)
    assert choice["message"]["content"] == "a fox 🚂"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["place"]


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "token by token"])
async def test_several_calls_are_each_read(model: Model, at_once: bool) -> None:
    plan = model.plan(tool_choice="required")
    random_model = at_random(model, 2, ends_early=False)
    begun = 0

    def choose(count: int, allowed: list[int]) -> int:
        """Three calls at most, where the template has more than one."""
        nonlocal begun
        comma, close = model.tokenizer.convert_tokens_to_ids([",", "]"])
        more = [
            it for it in (model.begin, comma) if it in allowed and (it != comma or close in allowed)
        ]
        if more and count:
            begun += 1
            if begun <= 2:
                return more[0]
        ends = [it for it in allowed if it in model.eos]
        others = [it for it in allowed if it not in more] or allowed
        return ends[0] if ends else random_model(count, others)

    choice = await drawn(model, plan, choose, at_once=at_once)
    calls = choice["message"]["tool_calls"]
    assert len(calls) == (1 if "<|eom|>" in model.tokenizer.chat_template else 3)
    assert all(json.loads(it["function"]["arguments"])["place"] for it in calls)
    assert choice["message"]["content"] is None


async def test_a_model_that_may_call_may_also_talk(model: Model) -> None:
    spoken = [*model.tokenizer("a fox", add_special_tokens=False)["input_ids"], model.eos[0]]
    choice = await drawn(model, model.plan(), lambda count, _: int(spoken[count]), at_once=True)
    assert choice["message"]["content"] == "a fox" and choice["finish_reason"] == "stop"
