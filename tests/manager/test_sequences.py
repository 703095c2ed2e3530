"""One request's pieces: in order, none lost, however slowly they are read."""

from __future__ import annotations

import struct

import pytest

from manager.encoding import Encoder, Prompt
from manager.generation import GenerationOptions, Piece, TokenLogprob
from manager.sequences import ActiveSequence
from manager.text import Vocabulary
from proto.errors import RequestRefused, UsageError
from proto.messages import Drawn
from tests.support.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(chat=True)
VOCABULARY = Vocabulary(TOKENIZER)


def sequence(prompt: tuple[int, ...] = (5,), **options) -> ActiveSequence:
    return ActiveSequence(0, Prompt(prompt), GenerationOptions(**options), VOCABULARY, now_s=10.0)


def ids_of(text: str) -> list[int]:
    return [int(i) for i in TOKENIZER(text)["input_ids"]]


async def read(active: ActiveSequence) -> list[Piece]:
    return [piece async for piece in active.pieces()]


async def test_a_slow_reader_gets_everything_in_one_piece():
    active = sequence()
    for at, token in enumerate(ids_of("lazy dog")):
        assert not active.token_came(token, None, now_s=11.0 + at)
    active.finish("length", now_s=20.0)
    (piece,) = await read(active)
    assert (piece.text, piece.finish_reason) == ("lazy dog", "length")
    assert list(piece.token_ids) == ids_of("lazy dog")


async def test_a_completion_has_the_times_and_the_rate():
    active = sequence()
    for at, token in enumerate(ids_of("lazy dog")):
        active.token_came(token, None, now_s=11.0 + at / 4)
    active.finish("length", now_s=20.0)
    completion = active.completion()
    assert completion.ttft_s == 1.0
    assert completion.latency_s == 10.0
    assert completion.decode_tokens_per_s == pytest.approx(4.0)
    assert len(completion.token_times_s) == completion.completion_tokens


async def test_a_text_without_tokens_has_no_rate():
    active = sequence()
    active.finish("cancelled", now_s=12.0)
    completion = active.completion()
    assert (completion.ttft_s, completion.decode_tokens_per_s) == (None, None)
    assert completion.text == ""


async def test_a_stop_text_is_seen_at_once_and_never_shown():
    active = sequence(stop=("dog",))
    seen = [active.token_came(token, None, now_s=11.0) for token in ids_of("lazy dog")]
    assert seen[-1]
    active.finish("stop", now_s=12.0)
    assert "".join(piece.text for piece in await read(active)) == "lazy "


async def test_the_end_token_counts_and_is_silent():
    active = sequence()
    active.end_token_came(TOKENIZER.eos_token_id, None, now_s=11.0)
    active.finish("stop", now_s=11.0)
    (piece,) = await read(active)
    assert (piece.text, piece.token_ids) == ("", (TOKENIZER.eos_token_id,))


async def test_the_first_end_is_the_one_that_counts():
    active = sequence()
    active.finish("error", "a worker was lost", now_s=11.0)
    active.finish("cancelled", now_s=12.0)
    (piece,) = await read(active)
    assert (piece.finish_reason, piece.error) == ("error", "a worker was lost")


async def test_the_history_has_every_token_once_and_only_where_a_draw_looks_back():
    plain, looking = sequence((5, 6, 5)), sequence((5, 6, 5), repetition_penalty=1.1)
    for active in (plain, looking):
        active.token_came(9, Drawn(sequence=0, token=9), now_s=11.0)
        active.token_came(6, Drawn(sequence=0, token=6), now_s=11.0)
    assert list(plain.history) == []
    assert list(looking.history) == [5, 6, 9]
    assert looking.sampling(2).num_history == 3


async def test_every_request_without_a_seed_draws_otherwise():
    assert sequence().seed != sequence().seed
    assert sequence(seed=4).seed == 4


def test_a_plain_prompt_continues_its_text_and_a_conversation_does_not():
    encoder = Encoder(TOKENIZER, "tiny")
    plain, chat = encoder.encode("fox"), encoder.encode_chat([{"role": "user", "content": "fox"}])
    assert plain.context == plain.token_ids
    assert chat.context == ()
    assert TOKENIZER.decode(chat.token_ids) == "<|user|>fox<|end|><|assistant|>"


def test_what_cannot_be_a_prompt_is_refused():
    encoder = Encoder(TOKENIZER, "tiny")
    with pytest.raises(RequestRefused, match="empty"):
        encoder.encode("")
    with pytest.raises(RequestRefused, match="empty"):
        encoder.encode_chat([{"role": "user", "content": ""}])
    with pytest.raises(UsageError, match="tiny has no chat template"):
        Encoder(byte_level_tokenizer(), "tiny").encode_chat([{"role": "user", "content": "x"}])


def test_what_a_template_does_not_take_is_one_sentence():
    strict = byte_level_tokenizer(chat=True)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestRefused, match=r"tiny does not take .* roles must alternate"):
        Encoder(strict, "tiny").encode_chat([{"role": "user", "content": "x"}])


async def test_the_scores_of_a_prompt_come_whole_with_the_piece_that_has_the_last_of_them():
    active = sequence((5, 6, 7), prompt_logprobs=1)
    active.scores_came(1, struct.pack("<fif", -2.0, 9, -0.5))
    active.scores_came(1, struct.pack("<fif", -0.25, 7, -0.25))
    active.token_came(ids_of("fox")[0], None, now_s=11.0)
    active.finish("length", now_s=12.0)
    (piece,) = await read(active)
    assert piece.prompt_logprobs is not None and len(piece.prompt_logprobs) == 2
    assert list(piece.prompt_logprobs) == [
        TokenLogprob(6, -2.0, ((9, -0.5),)),
        TokenLogprob(7, -0.25, ((7, -0.25),)),
    ]
    assert active.completion().prompt_logprobs == piece.prompt_logprobs


async def test_a_prompt_of_one_token_has_no_scores_and_says_so_at_once():
    active = sequence((5,), prompt_logprobs=0, max_new_tokens=0)
    active.finish("length", now_s=12.0)
    (piece,) = await read(active)
    assert piece.prompt_logprobs is not None and list(piece.prompt_logprobs) == []
    with pytest.raises(RequestRefused, match="max_new_tokens is 0"):
        sequence((5,), max_new_tokens=0)
