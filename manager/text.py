"""Turn tokens into text as they come, without ever taking a word back.

Pure but for the tokenizer it is handed: token ids in, pieces of text out. What is given out
never changes later, so a terminal may print it at once. Knows nothing of requests or links.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

REPLACEMENT: Final = "\ufffd"  # what decoders write for bytes that are no UTF-8 (yet)

# How many tokens of the prompt lead the first window. SentencePiece decoders drop the space in
# front of the first word they see; with a few tokens ahead the first new word keeps its space.
CONTEXT_TOKENS: Final = 6

BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")

NOTHING_SHOWN: Final[Mapping[int, str]] = MappingProxyType({})

Decode = Callable[[Sequence[int]], str]


def decoder(tokenizer: Any) -> Decode:
    """The tokenizer's own `decode`, special tokens left out, spaces as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "decode"):
        # The same text as `tokenizer.decode`, without its 30 microseconds of bookkeeping.
        return lambda ids: str(backend.decode(list(ids), skip_special_tokens=True))
    return lambda ids: str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that `decode` leaves out, and their names.

    More than `all_special_ids` has: a token may be marked special in tokenizer.json and have no
    role there, as those that begin a call of a function often are.
    """
    ids, names = tokenizer.all_special_ids, tokenizer.all_special_tokens
    found = {int(token): str(name) for token, name in zip(ids, names, strict=True)}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "get_added_tokens_decoder"):
        added = backend.get_added_tokens_decoder().items()
        found |= {int(token): str(it.content) for token, it in added if it.special}
    return found


class Vocabulary:
    """What a tokenizer is asked over and over: text of ids, which ids are special, which bytes.

    Without a tokenizer every token's text is empty.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        if tokenizer is None:
            self.decode: Decode = lambda _: ""
            self.special: frozenset[int] = frozenset()
            self.byte_ids: frozenset[int] = frozenset()
            return
        self.decode = decoder(tokenizer)
        self.special = frozenset(special_tokens(tokenizer))
        self.byte_ids = frozenset(
            int(i) for text, i in tokenizer.get_vocab().items() if BYTE_TOKEN.match(text)
        )


class Detokenizer:
    """The text of one sequence, piece by piece.

    The pieces joined are what decoding all ids at once gives. A piece never ends inside a
    UTF-8 character. Decoding goes over a short window of the latest tokens; the window starts
    where a character starts, so that its text is a suffix of the whole text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        context: Sequence[int] = (),
        shown: Mapping[int, str] = NOTHING_SHOWN,
    ) -> None:
        """
        Args:
            context: the text that the tokens continue: the prompt, where it is text.
            shown: special tokens that have a text all the same, and that text.
        """
        self._vocabulary, self._shown = vocabulary, shown
        self._window: list[int] = []
        self._given_chars = 0  # of the window's text
        self._settled_tokens = 0  # of the window; their text was given whole
        tail = list(context[-CONTEXT_TOKENS:])
        before = vocabulary.decode(tail) if tail else ""
        if before and not self._may_change(tail, before):
            self._window, self._given_chars, self._settled_tokens = tail, len(before), len(tail)

    def add(self, token: int) -> str:
        """Take one token; give the text that is certain now, perhaps none."""
        if token in self._shown:
            return self._show(token)
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        if self._may_change(self._window, text):
            return self._give(text[: self._certain_chars(text)])
        piece = self._give(text)
        if piece:
            self._advance(text)
        return piece

    def flush(self) -> str:
        """The end: give what was held back, replacement characters and all."""
        return self._give(self._vocabulary.decode(self._window)) if self._window else ""

    def _show(self, token: int) -> str:
        """A special token's own text; what was held back before it is over now."""
        before, window = self.flush(), self._window
        if window and self._may_change(window, self._vocabulary.decode(window)):
            # No character goes on behind it: its bytes must not wait for those that follow.
            self._window, self._given_chars = [], 0
        elif not window or window[-1] not in self._shown:
            window.append(token)  # decoded, it is silent: the next word keeps its space
        self._settled_tokens = len(self._window)
        return before + self._shown[token]

    def _give(self, text: str) -> str:
        piece = text[self._given_chars :]
        self._given_chars = max(self._given_chars, len(text))
        return piece

    def _advance(self, text: str) -> None:
        """Forget the tokens before the latest settled ones; those stay as context."""
        latest = self._window[self._settled_tokens :]
        if len(latest) < len(self._window):
            text = self._vocabulary.decode(latest)
        self._window, self._given_chars, self._settled_tokens = latest, len(text), len(latest)

    def _may_change(self, ids: Sequence[int], text: str) -> bool:
        """Whether a later token can still change the end of this text."""
        return text.endswith(REPLACEMENT) or self._ends_in_byte_token(ids)

    def _certain_chars(self, text: str) -> int:
        """How much of a text that may still change is certain all the same."""
        if self._vocabulary.byte_ids:
            # Byte-fallback decoders turn a whole run of byte tokens into replacement characters
            # when one of its bytes is wrong: nothing of the window is certain before the run ends.
            return self._given_chars
        # Byte-level decoders join all bytes first: only the last character can be unfinished.
        return max(self._given_chars, len(text) - 1)

    def _ends_in_byte_token(self, ids: Sequence[int]) -> bool:
        byte_ids, special = self._vocabulary.byte_ids, self._vocabulary.special
        if not byte_ids:
            return False
        last = next((i for i in reversed(ids) if i not in special), None)
        return last in byte_ids


@dataclass(frozen=True, slots=True)
class Cut:
    """Text that may be shown, and the stop text that ended it, if one did."""

    text: str
    stopped_by: str | None = None


class StopFinder:
    """Find stop texts wherever token borders fall, and hold back what may begin one.

    As if the text came character by character: the stop text that is complete first wins, of
    those complete at the same character the longest. It and what follows are never shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""

    def add(self, text: str) -> Cut:
        """Take the next text; give what cannot be part of a stop text."""
        if not self._stops:
            return Cut(text)
        buffer = self._held + text
        found = [
            (at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0
        ]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return Cut(buffer[:at], stop)
        hold = max(held_chars(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - hold :]
        return Cut(buffer[: len(buffer) - hold])

    def flush(self) -> str:
        """The end without a stop text: what was held back is text after all."""
        held, self._held = self._held, ""
        return held


def held_chars(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (not all of it)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Tokens of one sequence in, text to show out: detokenised, stop texts cut off."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
        shown: Mapping[int, str] = NOTHING_SHOWN,
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, context, shown)
        self._finder = StopFinder(stops)

    def add(self, token: int) -> Cut:
        """Take one token; `stopped_by` is set when the text is over."""
        return self._finder.add(self._detokenizer.add(token))

    def flush(self) -> Cut:
        """No token follows: the rest of the text. A stop text may still show up in it."""
        cut = self._finder.add(self._detokenizer.flush())
        return cut if cut.stopped_by else Cut(cut.text + self._finder.flush())
