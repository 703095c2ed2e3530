"""An answer of a llama-server, put together from the events of its stream."""

from __future__ import annotations

from manager.generation import GenerationOptions
from manager.llama_server.answer import Answer, Event, Gap

OPTIONS = GenerationOptions(max_new_tokens=8)


def answer_to(*events: Event, options: GenerationOptions = OPTIONS) -> Answer:
    answer = Answer(options)
    for number, event in enumerate(events):
        answer.take(event, float(number))
    return answer


def test_a_character_of_three_tokens_counts_three_and_its_ids_are_put_in_later():
    answer = answer_to(
        Event(text="a", token_ids=(5,), num_tokens=1),
        Event(text="語", token_ids=(9,), num_tokens=4),
        Event(text="b", token_ids=(6,), num_tokens=5),
        Event(num_tokens=5, finish_reason="length", prompt_tokens=3),
    )
    assert answer.gaps == [Gap(1, 2, "語", (9,))]
    answer.fill([(answer.gaps[0], (7, 8, 9))])
    completion = answer.end(4.0, context=100)
    assert completion.text == "a語b"
    assert completion.token_ids == (5, 7, 8, 9, 6)
    assert completion.completion_tokens == 5
    assert completion.token_times_s == (0.0, 1.0, 1.0, 1.0, 2.0)
    assert completion.prompt_tokens == 3
    assert completion.detail == "the server's context of 100 tokens is full"


def test_a_half_character_at_the_end_is_shown_as_one():
    answer = answer_to(
        Event(text="a", token_ids=(5,), num_tokens=1),
        Event(num_tokens=3, finish_reason="length"),
    )
    assert answer.end(2.0).text == "a\ufffd"


def test_an_end_token_without_an_event_of_its_own_is_no_half_character():
    answer = answer_to(
        Event(text="a", token_ids=(5,), num_tokens=1),
        Event(num_tokens=2, finish_reason="stop", by_end_token=True),
    )
    completion = answer.end(2.0)
    assert completion.text == "a"
    assert completion.completion_tokens == 2


def test_what_might_have_begun_a_stop_text_is_text_when_the_answer_ends():
    options = GenerationOptions(max_new_tokens=8, stop=("xyz",))
    pieces = []
    answer = Answer(options, pieces.append)
    answer.take(Event(text="ax", token_ids=(1,), num_tokens=1), 0.0)
    answer.take(Event(text="y", token_ids=(2,), num_tokens=2), 1.0)
    answer.take(Event(num_tokens=2, finish_reason="length"), 2.0)
    assert not answer.is_stopped
    completion = answer.end(2.0)
    answer.give_last_piece(completion)
    assert completion.text == "axy"
    assert [piece.text for piece in pieces] == ["a", "", "xy"]
    assert pieces[-1].finish_reason == "length"


def test_a_server_that_counts_no_tokens_is_counted_by_its_events():
    answer = answer_to(Event(text="a"), Event(text="b"), Event(finish_reason="stop"))
    assert answer.end(2.0).completion_tokens == 2


def test_an_answer_that_nobody_finished_is_not_finished():
    assert not answer_to(Event(text="a", token_ids=(1,), num_tokens=1)).is_finished
