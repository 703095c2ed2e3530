"""A prompt in front of its completion: its text, and where each of its tokens ends in it.

Pure: token ids and bytes in, numbers of characters out.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Echo:
    """What stands before the text of each choice of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    ends: tuple[int, ...] | None = None  # of each token in the text, where the tokenizer knows

    def offsets(self, token_bytes: Callable[[int], bytes]) -> list[int]:
        """Where each token begins, in characters: where the one before it ends.

        Special tokens that the tokenizer has added have no text. Of a character that several
        tokens make up, the later ones may begin behind it or at it.
        """
        ends = self.ends
        if ends is None:
            ends = reckoned_ends(self.text, map(token_bytes, self.token_ids))
        return [0, *accumulate(ends[:-1], max)]


def reckoned_ends(text: str, tokens: Sequence[bytes] | map[bytes]) -> tuple[int, ...]:
    """Where tokens end in the text that they were decoded to, by their bytes."""
    place = Place()
    said = [place.add(raw) for raw in tokens]
    joined = "".join(said)
    # Some decoders drop a space in front of the first word.
    missing = len(joined) - len(text) if joined.endswith(text) else 0
    ends = accumulate(map(len, said))
    return tuple(min(max(0, end - missing), len(text)) for end in ends)


class Place:
    """How far a text is, token by token; a character counts when it is whole."""

    def __init__(self, start: int = 0) -> None:
        self.chars = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, raw: bytes) -> str:
        """The characters that are whole with this token."""
        text = self._decoder.decode(raw)
        self.chars += len(text)
        return text
