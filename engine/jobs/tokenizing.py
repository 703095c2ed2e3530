"""Write samples as token ids, with labels that say which tokens are learnt.

A label is the token's own id where it is learnt and NOT_LEARNT elsewhere: running text is learnt
whole, of an exchange or a conversation only the answers. Knows the tokenizer and its chat
template; no file, no model weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.jobs.rows import Place
from engine.jobs.settings import DataSettings
from engine.jobs.shapes import Conversation, Exchange, Message, Sample, Text, Tokens
from proto.errors import ModelError, UsageError

NOT_LEARNT: Final = -100  # what torch's cross entropy leaves out

# Why a sample gave no row.
EMPTY: Final = "nothing in it"
TOO_SHORT: Final = "a single token, nothing to predict"
NO_ANSWER: Final = "no assistant message to learn from"
HIDDEN_ANSWER: Final = "the chat template does not show where the answer is"
PROMPT_FILLS: Final = "the prompt alone fills --max-length"
NOTHING_LEARNT: Final = "no token of it is learnt"

# For models without a chat template; as Alpaca's data was written.
_PLAIN_ROLES: Final = {
    "user": "### Instruction:\n{}\n\n",
    "assistant": "### Response:\n{}\n\n",
    "system": "{}\n\n",
}
_PLAIN_ANSWER: Final = "### Response:\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row's tokens; as many labels as ids, at least two of each."""

    ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sample: its rows, or why there are none."""

    rows: tuple[Encoded, ...] = ()
    dropped: str | None = None
    was_shortened: bool = False  # its end is missing


@dataclass(frozen=True, slots=True)
class _Writing:
    """A sample as one text, and which parts of it are learnt."""

    text: str
    learnt: tuple[tuple[int, int], ...]  # [start, end) in characters
    add_special_tokens: bool
    end_with_eos: bool


@dataclass(slots=True)
class Tokenizing:
    """A model's tokenizer, as training uses it."""

    tokenizer: Any  # a transformers one; None where the model came without
    model_name: str
    vocab_size: int  # rows of the embedding matrix
    max_length: int
    settings: DataSettings
    hidden_turns: int = 0  # answers that the chat template writes so that they are not found

    @property
    def template(self) -> str:
        """ "chat" or "plain": how an instruction and its answer are written."""
        if self.settings.template == "auto":
            return "chat" if getattr(self.tokenizer, "chat_template", None) else "plain"
        return self.settings.template

    def encode(self, samples: Sequence[tuple[Place, Sample]]) -> list[Outcome]:
        """What becomes of each sample. Many at once are faster than one by one.

        Raises:
            DataError: token ids that the model does not have, or a conversation that the chat
                template refuses; names file and line.
            ModelError: texts, and the model has no tokenizer.
            UsageError: conversations, and the model has no chat template.
        """
        outcomes: list[Outcome | None] = [None] * len(samples)
        writings: list[tuple[int, _Writing]] = []
        for at, (place, sample) in enumerate(samples):
            match sample:
                case Tokens():
                    outcomes[at] = self._tokens(place, sample)
                case _:
                    written = self._write(place, sample)
                    if isinstance(written, str):
                        outcomes[at] = Outcome(dropped=written)
                    else:
                        writings.append((at, written))
        for (at, writing), encoded in zip(
            writings, self._encode([it for _, it in writings]), strict=True
        ):
            is_text = isinstance(samples[at][1], Text)
            outcomes[at] = self._cut(encoded) if is_text else self._shorten(encoded, writing)
        return [it for it in outcomes if it is not None]

    def check_vocabulary(self, outcomes: Sequence[Outcome]) -> None:
        """The tokenizer's ids have rows in the embedding matrix.

        Raises:
            ModelError: one has not; the tokenizer belongs to another model.
        """
        largest = max((max(row.ids) for it in outcomes for row in it.rows), default=0)
        if largest >= self.vocab_size:
            raise ModelError(
                f"the tokenizer of {self.model_name} makes token id {largest}, and the model has "
                f"{self.vocab_size}: tokenizer and model do not belong together."
            )

    # --- samples as text ----------------------------------------------------------------------

    def _write(self, place: Place, sample: Sample) -> _Writing | str:
        """The sample as text, or why it is dropped."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.model_name} has no tokenizer, and {place} holds text: put tokenizer.json "
                "beside its config.json, or train on input_ids."
            )
        if isinstance(sample, Text):
            return _Writing(sample.text, ((0, len(sample.text)),), True, True)
        if isinstance(sample, Exchange):
            text = sample.prompt + sample.answer
            return _Writing(text, ((len(sample.prompt), len(text)),), True, True)
        assert isinstance(sample, Conversation)
        answers = [
            at
            for at, message in enumerate(sample.messages)
            if message["role"] == "assistant"
            and at >= sample.learn_from
            and message["content"].strip()
        ]
        if not answers:
            return NO_ANSWER
        if self.template == "chat":
            return self._write_chat(place, sample.messages, answers)
        if self.settings.template == "auto" and not sample.is_instruction:
            raise UsageError(
                f"the tokenizer of {self.model_name} has no chat template, and {place} holds a "
                "conversation: take a model that was tuned for chat, or pass --template plain, "
                "which writes '### Instruction:' and '### Response:'."
            )
        return _write_plain(sample.messages, answers)

    def _write_chat(
        self, place: Place, messages: Sequence[Message], answers: Sequence[int]
    ) -> _Writing | str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"--template chat: the tokenizer of {self.model_name} has no chat template; "
                "pass --template plain."
            )
        text = self._apply(place, messages)
        spans = []
        for at in answers:
            span = self._answer_span(place, text, messages, at)
            if span is None:
                self.hidden_turns += 1
            else:
                spans.append(span)
        if not spans:
            return HIDDEN_ANSWER
        ends_itself = text.rstrip().endswith(self._special_tokens())
        return _Writing(text, tuple(spans), False, not ends_itself)

    def _answer_span(
        self, place: Place, text: str, messages: Sequence[Message], at: int
    ) -> tuple[int, int] | None:
        """Where answer `at` stands in the whole text, as the template writes what is around it.

        None where the template writes earlier turns in another way once later ones follow.
        """
        for ask in (True, False):
            before = self._apply(place, messages[:at], add_generation_prompt=ask) if at else ""
            if text.startswith(before):
                break
        else:
            return None
        after = text if at == len(messages) - 1 else self._apply(place, messages[: at + 1])
        return (len(before), len(after)) if text.startswith(after) else None

    def _apply(self, place: Place, messages: Sequence[Message], **settings: Any) -> str:
        try:
            written = self.tokenizer.apply_chat_template(
                [dict(it) for it in messages], tokenize=False, **settings
            )
        except Exception as exc:  # jinja's errors, and whatever a template raises by itself
            raise place.bad(
                f"the chat template of {self.model_name} does not take this conversation: {exc}"
            ) from exc
        return str(written)

    def _special_tokens(self) -> tuple[str, ...]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {str(it) for it in added if getattr(it, "special", False)}
        return tuple((special | set(self.tokenizer.all_special_tokens)) - {""})

    # --- text as tokens -----------------------------------------------------------------------

    def _encode(self, writings: Sequence[_Writing]) -> list[Encoded]:
        """Ids and labels of whole texts, however long."""
        encoded: list[Encoded | None] = [None] * len(writings)
        for special in (True, False):
            some = [at for at, it in enumerate(writings) if it.add_special_tokens is special]
            if not some:
                continue
            texts = [writings[at].text for at in some]
            single = [_boundary(writings[at]) for at in some]
            needs_offsets = any(it is None for it in single)
            ids, offsets = self._ids(texts, special, with_offsets=needs_offsets)
            prompts, _ = self._ids(
                [text[: it or 0] for text, it in zip(texts, single, strict=True)],
                special,
                with_offsets=False,
            )
            for index, at in enumerate(some):
                writing = writings[at]
                if single[index] == 0:
                    row = Encoded(ids[index], list(ids[index]))
                elif single[index] is not None:
                    row = self._continued(writing, ids[index], self._without_end(prompts[index]))
                elif offsets is not None:
                    row = _by_offsets(writing, ids[index], offsets[index])
                else:
                    row = self._piece_by_piece(writing)
                encoded[at] = self._ended(writing, row)
        return [it for it in encoded if it is not None]

    def _ids(
        self, texts: list[str], add_special_tokens: bool, *, with_offsets: bool
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]] | None]:
        with_offsets = with_offsets and bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=with_offsets,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"] if with_offsets else None

    def _continued(self, writing: _Writing, ids: list[int], prompt: list[int]) -> Encoded:
        """A prompt and its answer. Whoever prompts the model later tokenizes the prompt alone."""
        if ids[: len(prompt)] == prompt:
            return _learnt_from(ids, len(prompt))
        # A token reaches over the border. Apart, the answer starts where it will start later.
        (start, _) = writing.learnt[0]
        answer, _ = self._ids([writing.text[start:]], False, with_offsets=False)
        apart = [*prompt, *answer[0]]
        if self.tokenizer.decode(apart) == self.tokenizer.decode(ids):
            return _learnt_from(apart, len(prompt))
        common = next(
            (at for at, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b),
            min(len(ids), len(prompt)),
        )
        return _learnt_from(ids, common)

    def _piece_by_piece(self, writing: _Writing) -> Encoded:
        """For tokenizers that do not say where in the text their tokens are."""
        ids: list[int] = []
        labels: list[int] = []
        end = 0
        for start, stop in (*writing.learnt, (len(writing.text), len(writing.text))):
            for text, is_learnt in (
                (writing.text[end:start], False),
                (writing.text[start:stop], True),
            ):
                if text:
                    first = not ids and writing.add_special_tokens
                    piece = self._ids([text], first, with_offsets=False)[0][0]
                    piece = self._without_end(piece) if first else piece
                    ids += piece
                    labels += piece if is_learnt else [NOT_LEARNT] * len(piece)
            end = stop
        return Encoded(ids, labels)

    def _without_end(self, ids: list[int]) -> list[int]:
        """Some tokenizers end every text with the end token by themselves."""
        eos = self.tokenizer.eos_token_id
        return ids[:-1] if ids and eos is not None and ids[-1] == eos and len(ids) > 1 else ids

    def _ended(self, writing: _Writing, row: Encoded) -> Encoded:
        eos = self.tokenizer.eos_token_id
        if not writing.end_with_eos or eos is None or (row.ids and row.ids[-1] == eos):
            return row
        return Encoded([*row.ids, eos], [*row.labels, eos])

    # --- rows that fit ------------------------------------------------------------------------

    def _cut(self, encoded: Encoded) -> Outcome:
        """Running text goes on in the next row."""
        count, limit = len(encoded.ids), self.max_length
        if count < 2:
            return Outcome(dropped=TOO_SHORT)
        ends = [*range(limit, count, limit), count]
        if count % limit == 1 and limit > 2:
            ends[-2] -= 1  # a single token teaches nothing: the last row takes two
        starts = [0, *ends[:-1]]
        pieces = (
            Encoded(encoded.ids[start:end], encoded.labels[start:end])
            for start, end in zip(starts, ends, strict=True)
            if end - start > 1
        )
        return Outcome(tuple(pieces))

    def _shorten(self, encoded: Encoded, writing: _Writing | None) -> Outcome:
        """Of an answer that is too long, the beginning is learnt."""
        learn_all = writing is not None and self.settings.loss_on == "all"
        labels = list(encoded.ids) if learn_all else encoded.labels
        if len(encoded.ids) < 2:
            return Outcome(dropped=TOO_SHORT)
        row = Encoded(encoded.ids[: self.max_length], labels[: self.max_length])
        if all(it == NOT_LEARNT for it in row.labels[1:]):
            was_learnt = any(it != NOT_LEARNT for it in labels[1:])
            return Outcome(dropped=PROMPT_FILLS if was_learnt else NOTHING_LEARNT)
        return Outcome((row,), was_shortened=len(encoded.ids) > self.max_length)

    def _tokens(self, place: Place, sample: Tokens) -> Outcome:
        for at, (token_id, label) in enumerate(
            zip(sample.ids, sample.labels or sample.ids, strict=True)
        ):
            if token_id >= self.vocab_size:
                raise place.bad(f"input_ids has {token_id} at {at}: {self._vocabulary()}")
            if label >= self.vocab_size or NOT_LEARNT < label < 0:
                raise place.bad(f"labels has {label} at {at}: {self._vocabulary()}")
        if sample.labels is None:
            return self._cut(Encoded(sample.ids, sample.ids))
        return self._shorten(Encoded(sample.ids, sample.labels), None)

    def _vocabulary(self) -> str:
        return (
            f"{self.model_name} has token ids from 0 to {self.vocab_size - 1}; "
            "the data was tokenized for another model."
        )


def _write_plain(messages: Sequence[Message], answers: Sequence[int]) -> _Writing:
    text, spans = "", []
    for at, message in enumerate(messages):
        pattern = _PLAIN_ROLES.get(message["role"], f"### {message['role'].title()}:\n{{}}\n\n")
        start = len(text)
        text += pattern.replace("{}", message["content"])
        if at == len(messages) - 1:
            text = text.removesuffix("\n\n")
        if at in answers:
            spans.append((start + len(_PLAIN_ANSWER), len(text)))
    return _Writing(text, tuple(spans), True, messages[-1]["role"] == "assistant")


def _boundary(writing: _Writing) -> int | None:
    """Where the one learnt part starts that reaches to the end; None if it is not so simple."""
    if len(writing.learnt) == 1 and writing.learnt[0][1] == len(writing.text):
        return writing.learnt[0][0]
    return None


def _learnt_from(ids: Sequence[int], start: int) -> Encoded:
    return Encoded(list(ids), [NOT_LEARNT] * start + list(ids[start:]))


def _by_offsets(writing: _Writing, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    """By where tokens end: byte-level tokenizers leave spaces before a token out of its offsets."""
    labels, spans = [], iter((*writing.learnt, (len(writing.text) + 1, len(writing.text) + 1)))
    start, stop = next(spans)
    for token_id, (_, end) in zip(ids, offsets, strict=True):
        while end > stop:
            start, stop = next(spans)
        labels.append(token_id if start < end <= stop else NOT_LEARNT)
    return Encoded(ids, labels)
