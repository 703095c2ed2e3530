"""Rows of tokens, ready to be learnt from: what every way of training reads.

Held as flat arrays, 8 bytes a token, whatever the rows' number. Several samples may share a row
(packing); each one's positions then start at 0 again. Knows no text and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.jobs.packing import pack
from engine.jobs.tokenizing import NOT_LEARNT, Encoded

Ints = NDArray[np.int64]

FIRST: Final = slice(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One row; three arrays of the same length."""

    input_ids: Ints
    labels: Ints  # not shifted: a position's label is its own token, or NOT_LEARNT
    position_ids: Ints


class TokenRows:
    """A sequence of rows."""

    def __init__(
        self,
        ids: NDArray[np.int32],
        labels: NDArray[np.int32],
        starts: Ints,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Hold samples end to end.

        Args:
            ids, labels: (tokens,), of all samples.
            starts: (samples + 1,), where each sample starts, and where the last one ends.
            groups: which samples share a row; None: each has its own.
        """
        self._ids, self._labels, self._starts = ids, labels, starts
        self.groups = groups

    @classmethod
    def of(cls, samples: Iterable[Encoded]) -> TokenRows:
        """A row each."""
        ids: list[NDArray[np.int32]] = []
        labels: list[NDArray[np.int32]] = []
        starts = [0]
        for sample in samples:
            ids.append(np.asarray(sample.ids, dtype=np.int32))
            labels.append(np.asarray(sample.labels, dtype=np.int32))
            starts.append(starts[-1] + len(sample.ids))
        nothing = np.zeros(0, dtype=np.int32)
        return cls(
            np.concatenate([nothing, *ids]),
            np.concatenate([nothing, *labels]),
            np.asarray(starts, dtype=np.int64),
        )

    def packed(self, capacity: int) -> TokenRows:
        """The same samples, several a row, `capacity` tokens a row at most."""
        groups = pack(np.diff(self._starts).tolist(), capacity)
        return TokenRows(self._ids, self._labels, self._starts, groups)

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several samples."""
        return self.groups is not None

    @property
    def num_tokens(self) -> int:
        """Of all rows, without padding."""
        return len(self._ids)

    @property
    def num_learnt(self) -> int:
        """Tokens with a label; the first of a sample is never predicted."""
        counts = self._labels != NOT_LEARNT
        first = self._starts[:-1]
        return int(counts.sum() - counts[first].sum()) if len(first) else 0

    @property
    def lengths(self) -> Ints:
        """Tokens of each row."""
        sizes: Ints = np.diff(self._starts)
        if self.groups is None:
            return sizes
        return np.asarray([sizes[list(group)].sum() for group in self.groups], dtype=np.int64)

    @property
    def digest(self) -> str:
        """The same for the same rows in the same order, on every machine."""
        content = hashlib.sha256()
        for part in (self._ids, self._labels, self._starts):
            content.update(np.ascontiguousarray(part).data)
        content.update(repr([list(it) for it in self.groups or ()]).encode())
        return content.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._starts) - 1 if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> TokenRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = [index] if self.groups is None else self.groups[index]
        spans = [slice(self._starts[it], self._starts[it + 1]) for it in members]
        ids = np.concatenate([self._ids[it] for it in spans]).astype(np.int64)
        positions = np.concatenate([np.arange(it.stop - it.start) for it in spans])
        labels = []
        for span in spans:
            part = self._labels[span].astype(np.int64)
            # It would be predicted from the sample before, or from nothing.
            part[FIRST] = NOT_LEARNT
            labels.append(part)
        return TokenRow(ids, np.concatenate(labels), positions)
