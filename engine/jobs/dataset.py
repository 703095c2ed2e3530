"""From `--train-path` to rows of tokens: read, recognise, filter, tokenize, split, pack.

Reads like what happens to the data, in order. The same for LoRA, SFT and AxoNN, and for
`manager finetune data`, which only shows the summary. Knows no model weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from engine.jobs.data_places import NAMED_SETS, Source, find_data
from engine.jobs.data_summary import DataSummary, Lengths, Split
from engine.jobs.rows import DataError, Place
from engine.jobs.settings import DataSettings
from engine.jobs.shapes import Conversation, Sample, Shape, find_shape, language_of
from engine.jobs.token_rows import TokenRows
from engine.jobs.tokenizing import EMPTY, Encoded, Tokenizing

DEFAULT_MAX_LENGTH: Final = 1024
CHUNK: Final = 512  # samples tokenized at once
LANGUAGES_SHOWN: Final = 8

Progress = Callable[[int], None]  # called with samples read so far


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run trains on."""

    train: TokenRows
    validation: TokenRows | None
    summary: DataSummary


@dataclass(slots=True)
class _Read:
    """The kept samples of a split: each one's rows."""

    samples: list[tuple[Encoded, ...]] = field(default_factory=list)

    def rows(self) -> TokenRows:
        return TokenRows.of(row for sample in self.samples for row in sample)


def prepare(
    settings: DataSettings,
    *,
    tokenizer: Any,
    model_name: str,
    vocab_size: int,
    max_context: int,
    seed: int,
    on_progress: Progress = lambda _: None,
) -> Dataset:
    """Everything between the settings and the first batch.

    Args:
        tokenizer: the model's; None where it has none, which is enough for token ids.
        vocab_size: rows of the embedding matrix.
        max_context: the most tokens that the model takes.
        seed: of the choice of the samples that `holdout` keeps apart.
    Raises:
        DataError: missing, malformed or empty data; names file and line.
        UsageError, ModelError: settings or data that do not fit the model.
    """
    max_length = choose_max_length(settings, max_context, model_name)
    tokenizing = Tokenizing(tokenizer, model_name, vocab_size, max_length, settings)
    summary = DataSummary(max_length=max_length, packing=settings.packing)
    train_sources, validation_sources = _find_sources(settings, summary)
    train, validation = _Read(), _Read()
    for split, sources in ((train, train_sources), (validation, validation_sources)):
        name = "train" if split is train else "validation"
        for wanted in sources:
            _read_source(wanted, name, split, tokenizing, summary, settings, on_progress)
    _refuse_empty(train, train_sources, settings, summary)
    if validation_sources and not validation.samples:
        raise DataError(f"the validation data has no sample left{_why_none(summary)}.")
    if settings.holdout is not None:
        train, validation = _hold_out(train, settings.holdout, seed)
    summary.hidden_turns = tokenizing.hidden_turns
    rows = _finished(train, settings, max_length)
    summary.train = _describe(train, rows, max_length)
    validation_rows = _finished(validation, settings, max_length) if validation.samples else None
    if validation_rows is not None:
        summary.validation = _describe(validation, validation_rows, max_length)
    return Dataset(rows, validation_rows, summary)


def choose_max_length(settings: DataSettings, max_context: int, model_name: str) -> int:
    """Tokens that a row may have.

    Raises:
        DataError: more than the model takes.
    """
    if settings.max_length is None:
        return min(DEFAULT_MAX_LENGTH, max_context)
    if settings.max_length > max_context:
        raise DataError(
            f"--max-length {settings.max_length}: {model_name} takes {max_context} tokens at most."
        )
    return settings.max_length


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A source, and whether the language filter is for it."""

    source: Source
    is_filtered: bool
    is_validation: bool


def _find_sources(
    settings: DataSettings, summary: DataSummary
) -> tuple[list[_Wanted], list[_Wanted]]:
    named = list(settings.train)
    extra = [
        NAMED_SETS[name]
        for name, is_wanted in (
            ("evol-instruct", settings.use_evol_instruct),
            ("magicoder", settings.use_magicoder),
        )
        if is_wanted
    ]
    if not named and (extra or settings.filter_language):
        named = [NAMED_SETS["hpc-instruct"]]
        summary.notes.append(f"no --train-path: {named[0]} is read, as in the guide")
    if not named:
        raise DataError(
            "there is no data to train on: pass --train-path with a file, a folder or a hub name."
        )
    train: list[_Wanted] = []
    validation: list[_Wanted] = []
    has_own = bool(settings.validation) or settings.holdout is not None
    for names, is_filtered in ((named, True), (extra, False)):
        for name in names:
            found = find_data(name, option="--train-path")
            train += [_Wanted(it, is_filtered, False) for it in found.train]
            summary.ignored += found.ignored
            if has_own:
                summary.ignored += [it.name for it in found.validation]
            else:
                validation += [_Wanted(it, is_filtered, True) for it in found.validation]
    for name in settings.validation:
        found = find_data(name, option="--val-path")
        validation += [_Wanted(it, True, True) for it in found.validation or found.train]
    return train, validation


def _read_source(
    wanted: _Wanted,
    split_name: str,
    split: _Read,
    tokenizing: Tokenizing,
    summary: DataSummary,
    settings: DataSettings,
    on_progress: Progress,
) -> None:
    """Tokenize one source's samples into the split."""
    said: dict[str, Any] = {
        "name": wanted.source.name,
        "split": split_name,
        "shape": None,
        "samples": 0,
    }
    summary.sources.append(said)
    before = len(split.samples)
    samples = _samples(wanted, said, summary, settings)
    while chunk := list(islice(samples, CHUNK)):
        if any(isinstance(sample, Conversation) for _, sample in chunk):
            summary.template = tokenizing.template
        outcomes = tokenizing.encode(chunk)
        tokenizing.check_vocabulary(outcomes)
        for (place, _), outcome in zip(chunk, outcomes, strict=True):
            if outcome.dropped is not None:
                summary.drop(place, outcome.dropped)
                continue
            summary.shortened += outcome.was_shortened
            summary.cut += len(outcome.rows) > 1
            split.samples.append(outcome.rows)
        on_progress(len(split.samples))
        if _is_enough(split_name, split, settings):
            del split.samples[settings.max_samples :]
            break
    said["samples"] = len(split.samples) - before


def _is_enough(split_name: str, split: _Read, settings: DataSettings) -> bool:
    return (
        split_name == "train"
        and settings.max_samples is not None
        and len(split.samples) >= settings.max_samples
    )


def _samples(
    wanted: _Wanted, said: dict[str, Any], summary: DataSummary, settings: DataSettings
) -> Iterator[tuple[Place, Sample]]:
    shape: Shape | None = None
    wanted_language = settings.filter_language if wanted.is_filtered else None
    for place, row in wanted.source.rows(settings.text_per):
        if shape is None:
            shape = find_shape(place, row, settings)
            said["shape"] = shape.name
            if wanted_language is not None and shape.language_column is None:
                raise place.bad(
                    f"--filter-language {wanted_language}: there is no 'language' (or 'lang') "
                    f"column in it; it has {', '.join(map(repr, row))}."
                )
        if wanted_language is not None and shape.language_column is not None:
            language = language_of(place, row, shape.language_column)
            summary.languages[language] += 1
            if language.lower() != wanted_language.lower():
                summary.drop(place, f"another language than {wanted_language}")
                continue
        sample = shape.make(place, row)
        if sample is None:
            summary.drop(place, EMPTY)
        else:
            yield place, sample


def _refuse_empty(
    train: _Read, sources: list[_Wanted], settings: DataSettings, summary: DataSummary
) -> None:
    if train.samples:
        return
    names = ", ".join(wanted.source.name for wanted in sources)
    if settings.filter_language and summary.languages:
        common = ", ".join(
            f"{language or '(none)'} ({count})"
            for language, count in summary.languages.most_common(LANGUAGES_SHOWN)
        )
        raise DataError(
            f"--filter-language {settings.filter_language} leaves no sample of {names}: "
            f"its languages are {common}."
        )
    raise DataError(f"{names} has no sample to train on{_why_none(summary)}.")


def _why_none(summary: DataSummary) -> str:
    if not summary.dropped:
        return ": it is empty"
    reasons = ", ".join(f"{count} with {why}" for why, count in summary.dropped.most_common())
    return f" ({reasons})"


def _hold_out(train: _Read, holdout: float | int, seed: int) -> tuple[_Read, _Read]:
    """Keep samples apart, the same for the same seed, before texts are cut or packed."""
    total = len(train.samples)
    count = round(total * holdout) if holdout < 1 else int(holdout)
    if not 1 <= count < total:
        raise DataError(
            f"--validation {holdout:g} would hold {count} of {total} samples out: it must leave at "
            "least one on both sides."
        )
    chosen = set(random.Random(seed).sample(range(total), count))
    return (
        _Read([it for at, it in enumerate(train.samples) if at not in chosen]),
        _Read([it for at, it in enumerate(train.samples) if at in chosen]),
    )


def _finished(read: _Read, settings: DataSettings, max_length: int) -> TokenRows:
    rows = read.rows()
    return rows.packed(max_length) if settings.packing else rows


def _describe(read: _Read, rows: TokenRows, max_length: int) -> Split:
    return Split(
        samples=len(read.samples),
        rows=len(rows),
        tokens=rows.num_tokens,
        learnt_tokens=rows.num_learnt,
        lengths=Lengths.of(rows.lengths.tolist()),
        fill=rows.num_tokens / (len(rows) * max_length) if rows.is_packed and len(rows) else None,
    )
