"""Texts that must follow a grammar: which tokens may come next, by llguidance.

Knows the library and a tokenizer; the masks travel to the last worker with the steps. A sequence
that is computed anew finds its constraint where it was: it is as far as the tokens that came.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer

from manager.serve.errors import ApiError, bad_value
from proto.codec import INT32_BYTES, mask_words

SPECIAL: Final = b"\xff"  # how the library marks special tokens

# White space that never ends would follow any grammar of JSON.
JSON_OPTIONS: Final[Any] = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{0,12}"}


class GrammarConstraint:
    """How far one text is in its grammar; `manager.sequences.Constraint`."""

    def __init__(self, matcher: LLMatcher, num_mask_words: int) -> None:
        self.num_mask_words = num_mask_words
        self._matcher = matcher

    def token_came(self, token: int) -> None:
        """One step further."""
        self._matcher.consume_token(token)

    def mask(self) -> bytes:
        """Which tokens may follow. A text that left its grammar may go on with none."""
        num_bytes = self.num_mask_words * INT32_BYTES
        if self._matcher.is_error():
            return bytes(num_bytes)
        try:
            # The library may say more than the vocabulary has, a word at most.
            return self._matcher.compute_bitmask()[:num_bytes].ljust(num_bytes, b"\0")
        except Exception:  # the step must go on for the others
            return bytes(num_bytes)


class Grammars:
    """The grammars that a model's texts can follow."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos)
        self._made: asyncio.Future[LLTokenizer] | None = None

    async def tokenizer(self) -> LLTokenizer:
        """The library's view of the vocabulary; made once, in a second or so.

        Raises:
            ApiError: it cannot be made of this model's tokenizer.
        """
        if self._made is None:
            self._made = asyncio.ensure_future(asyncio.to_thread(self._make))
        return await asyncio.shield(self._made)

    async def constraint(self, grammar: str, param: str) -> GrammarConstraint:
        """A grammar at its start.

        Raises:
            ApiError: the library does not take it; says why.
        """
        tokenizer = await self.tokenizer()
        matcher = await asyncio.to_thread(LLMatcher, tokenizer, grammar, log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())[:500]
            raise bad_value(param, f"{param} cannot be followed: {why}")
        return GrammarConstraint(matcher, mask_words(self._vocab_size))

    def _make(self) -> LLTokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ApiError(
                400,
                "this model's tokenizer has no table of tokens to build a grammar on: ask for "
                "plain text, without log-probabilities.",
            )
        definition = json.loads(backend.to_str())
        definition["padding"] = definition["truncation"] = None
        eos = self._eos or None
        return LLTokenizer(json.dumps(definition), n_vocab=self._vocab_size, eos_token=eos)


def json_grammar(schema: dict[str, Any], param: str) -> str:
    """A grammar of the JSON values that follow a schema.

    Raises:
        ApiError: it is no schema.
    """
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_OPTIONS)
    except ValueError as exc:
        raise bad_value(param, f"{param} is no JSON schema: {exc}") from exc


def token_bytes(tokenizer: LLTokenizer, token: int) -> bytes:
    """What a token stands for; of a special one, its name."""
    try:
        return bytes(tokenizer.decode_bytes([token])).removeprefix(SPECIAL)
    except (ValueError, IndexError, OverflowError):
        return b""
