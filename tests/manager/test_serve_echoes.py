"""Where the tokens of an echoed prompt stand in its text."""

from __future__ import annotations

from manager.serve.echoes import Echo, Place, reckoned_ends
from tests.support.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer


def test_places_are_reckoned_from_bytes_and_are_those_that_the_tokenizer_knows():
    tokenizer = byte_level_tokenizer()
    text = "the fox, naïve café 🚂🚂 日本語"
    found = tokenizer(text, return_offsets_mapping=True)
    tokens = [tokenizer.decode([it]) for it in found["input_ids"]]
    pieces = [tokenizer.backend_tokenizer.decode([it]) for it in found["input_ids"]]
    assert tokens == pieces and "\ufffd" in tokens  # halves of characters
    raw = [byte_of(tokenizer, it) for it in found["input_ids"]]
    reckoned = reckoned_ends(text, raw)
    known = [end for _, end in found["offset_mapping"]]
    assert reckoned[-1] == known[-1] == len(text)
    whole = [at for at, token in enumerate(tokens) if "\ufffd" not in token]
    assert [reckoned[at] for at in whole] == [known[at] for at in whole]


def byte_of(tokenizer, token: int) -> bytes:
    table = {}
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [it for it in range(256) if it not in codes]
    for byte in codes:
        table[chr(byte)] = byte
    for at, byte in enumerate(others):
        table[chr(256 + at)] = byte
    return bytes(table[it] for it in tokenizer.convert_ids_to_tokens(token))


def test_a_space_that_the_decoder_drops_is_no_character():
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer("the fox é", add_special_tokens=False)["input_ids"]
    raw = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        is_byte = token.startswith("<0x")
        raw.append(bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode())
    text = tokenizer.decode(ids)
    assert b"".join(raw).decode() == " " + text
    ends = reckoned_ends(text, raw)
    assert ends[-1] == len(text) and list(ends) == sorted(ends)


def test_a_special_token_without_text_begins_where_the_text_does():
    echo = Echo("fox", (1, 2, 3), (0, 2, 3))
    assert echo.offsets(lambda _: b"") == [0, 0, 2]


def test_ends_never_go_back():
    assert Echo("fox ", (1, 2, 3, 4), (2, 3, 0, 4)).offsets(lambda _: b"") == [0, 2, 3, 3]


def test_a_character_counts_with_the_token_that_makes_it_whole():
    place = Place(10)
    assert [place.add(it) for it in (b"a", b"\xc3", b"\xa9b")] == ["a", "", "éb"]
    assert place.chars == 13
