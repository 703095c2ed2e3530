"""What the times of tokens say, and that contestants take turns."""

from __future__ import annotations

import pytest

from manager.bench_load import Load
from manager.bench_rounds import Case, take_turns
from manager.bench_streams import Run, random_prompts
from proto.errors import Error


def test_decode_counts_only_while_every_stream_decodes():
    # The first stream begins at 1 s, the second at 2 s; the first ends at 4 s.
    run = Run(10, ((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 5.0)))
    assert run.decode_tokens_per_s == pytest.approx(4 / 2)
    assert run.tokens_per_s == pytest.approx(8 / 5)
    assert run.prompt_tokens_per_s == pytest.approx(20 / 2)
    assert run.first_s == (1.0, 2.0)
    assert run.gaps_s == (1.0,) * 6


def test_streams_that_never_decode_together_have_no_decode_rate():
    assert Run(10, ((1.0, 2.0), (2.0, 3.0))).decode_tokens_per_s is None
    assert Run(10, ((1.0,),)).decode_tokens_per_s is None


def test_prompts_have_exactly_their_length_and_no_two_begin_alike():
    prompts = [
        prompt for seed in range(4) for prompt in random_prompts(8, 39, vocab_size=32000, seed=seed)
    ]
    assert {len(prompt) for prompt in prompts} == {39}
    assert all(0 <= token < 32000 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts)


class Counting:
    """Answers at once; says who was asked for what."""

    def __init__(self, name, asked, *, fails_after=None):
        self.name, self._asked, self._fails_after = name, asked, fails_after

    async def generate(self, prompts, new_tokens):
        if self._fails_after is not None and len(self._asked) >= self._fails_after:
            raise Error(f"{self.name} is gone")
        self._asked.append((self.name, len(prompts), len(prompts[0]), new_tokens))
        return Run(len(prompts[0]), (tuple(float(it) for it in range(1, new_tokens + 1)),))


async def test_contestants_take_turns_and_the_first_round_does_not_count():
    asked = []
    cases = [Case("one", 1, 5, 8), Case("first round only", 2, 7, 2, rounds=1)]
    runs = await take_turns(
        [Counting("a", asked), Counting("b", asked)],
        cases,
        rounds=2,
        vocab_size=100,
        plays={"a": ["one", "first round only"], "b": ["one"]},
    )
    warm_up = [("a", 1, 5, 4), ("b", 1, 5, 4), ("a", 2, 7, 2)]
    counted = [("a", 1, 5, 8), ("b", 1, 5, 8)]
    assert asked == [*warm_up, *counted, ("a", 2, 7, 2), *counted]
    assert {key: len(found) for key, found in runs.found.items()} == {
        ("one", "a"): 2,
        ("one", "b"): 2,
        ("first round only", "a"): 1,
    }
    assert runs.median("one", "a", "decode_tokens_per_s") == pytest.approx(1.0)


async def test_one_that_fails_takes_no_part_any_more_and_the_others_go_on():
    asked = []
    runs = await take_turns(
        [Counting("a", asked), Counting("b", asked, fails_after=3)],
        [Case("one", 1, 5, 8)],
        rounds=2,
        vocab_size=100,
    )
    assert runs.failures == {"b": "b is gone"}
    assert len(runs.found["one", "a"]) == 2


def test_a_busy_machine_is_warned_of_with_its_share():
    load = Load(before=0.1, shares=[0.01, 0.02])
    assert load.warning is None
    load.shares.append(0.4)
    assert load.warning is not None
    assert "40 %" in load.warning and "1 of 3 runs" in load.warning
