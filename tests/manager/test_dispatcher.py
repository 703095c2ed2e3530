"""What a manager makes of the tokens that the last worker says it drew."""

from __future__ import annotations

from typing import Any

import pytest

from engine.requests import RunStep
from engine.scheduler import Scheduler
from manager.dispatcher import Dispatcher
from manager.encoding import Prompt
from manager.generation import GenerationOptions
from manager.text import Vocabulary
from proto.messages import Drawn, StepDone

NOTHING = memoryview(b"")  # no payload


class Writer:
    """Keeps the steps that would go to the first worker."""

    vocab_size = 100

    def __init__(self) -> None:
        self.steps: list[RunStep] = []

    def write(self, command: RunStep, sequences: Any) -> None:
        self.steps.append(command)


@pytest.mark.parametrize(
    "drawn",
    [
        Drawn(sequence=0, token=100),
        Drawn(sequence=0, token=2**31 - 1),
        Drawn(sequence=0, token=5, logprob=-1.0, top=[(5, -1.0), (100, -2.0)]),
    ],
)
async def test_a_token_that_the_vocabulary_has_not_ends_its_request_and_no_other(drawn) -> None:
    writer: Any = Writer()
    scheduler = Scheduler(num_blocks=8, block_tokens=16, num_stages=1, max_context=64)
    dispatcher = Dispatcher(
        scheduler, writer, Vocabulary(None), eos=frozenset(), prompt_salt=lambda _: 0
    )
    odd, other = (
        dispatcher.submit(Prompt((at,)), GenerationOptions(max_new_tokens=1)) for at in (1, 2)
    )
    [step] = writer.steps[:1]
    done = [drawn] + [Drawn(sequence=it.sequence, token=7) for it in step.runs if it.sequence]
    dispatcher.step_done(
        StepDone(lease=bytes(16), step=step.step, drawn=done), NOTHING, dispatcher.epoch
    )
    for later in writer.steps[1:]:
        rest = [Drawn(sequence=it.sequence, token=7) for it in later.runs]
        dispatcher.step_done(
            StepDone(lease=bytes(16), step=later.step, drawn=rest), NOTHING, dispatcher.epoch
        )
    assert (odd.completion().finish_reason, odd.completion().token_ids) == ("error", ())
    assert "drew a token that the vocabulary of 100 has not" in (odd.completion().error or "")
    assert (other.completion().finish_reason, other.completion().token_ids) == ("length", (7,))
