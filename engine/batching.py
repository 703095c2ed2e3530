"""What goes into the next step.

Decode tokens first, then pieces of prompts with what is left of the token budget, oldest first in
both. Takes room from `engine.roster`, the number of groups from its caller; numbers no steps and
sees no events.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as AbcSequence
from dataclasses import dataclass
from typing import Final

from engine.requests import PlannedRun, ScoredRows
from engine.roster import Roster, Sequence

NO_LIMIT: Final = sys.maxsize
# Of this size reading the weights is a small part of a chunk's time: a prompt is cut into more of
# them than overlapping needs rather than into larger ones. Measured with bench/prefill.py.
LARGE_CHUNK_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class IssuedRun:
    """A run on its way, with what is needed to judge what comes back."""

    sequence: Sequence
    life: int
    planned: PlannedRun
    published: tuple[tuple[int, int], ...]  # (block, serial) that others may have shared since

    @property
    def is_current(self) -> bool:
        """False once the sequence is over or lost the KV that this run was part of."""
        return self.sequence.running and self.sequence.life == self.life


@dataclass(frozen=True, slots=True)
class Batch:
    """The runs of one step."""

    runs: tuple[IssuedRun, ...]
    num_decodes: int

    @property
    def only_decodes(self) -> bool:
        return self.num_decodes == len(self.runs)


class Batcher:
    """Composes steps from the roster's sequences."""

    def __init__(
        self, roster: Roster, *, num_stages: int, token_budget: int, min_chunk_tokens: int
    ) -> None:
        self._roster = roster
        self._token_budget = token_budget
        # Chunks of one prompt follow each other down the pipeline. With n equal chunks over P
        # stages the last one leaves after n + P - 1 chunk times; at n = 2P a stage waits for less
        # than a third of the time, at 4P for less than a fifth, but each further cut reads all the
        # weights once more. One stage overlaps with nothing. Below some tens of tokens a chunk
        # costs what reading the weights costs, so a smaller one saves no time.
        overlapping = (2 * num_stages, 4 * num_stages) if num_stages > 1 else (1, 1)
        self._fewest_chunks, self._most_chunks = overlapping
        self._min_chunk_tokens = min(min_chunk_tokens, token_budget)
        self._chunk_tokens = 0  # of the present burst of prompts

    def compose(self, groups: int, in_flight: AbcSequence[int]) -> Batch | None:
        """The next step, or None when there is nothing (or no room) for one.

        Args:
            groups: steps that the decoding sequences are to be spread over.
            in_flight: decode tokens of the steps in flight that carry any.
        """
        runs: list[IssuedRun] = []
        limit = self._readmit()
        # A slot beyond the groups is for prompts: one more decode step would only split them.
        if len(in_flight) < groups:
            limit = min(limit, self._add_decodes(runs, groups, in_flight))
        num_decodes = len(runs)
        self._add_prefills(runs, limit)
        self._roster.step_composed()
        return Batch(tuple(runs), num_decodes) if runs else None

    def _readmit(self) -> int:
        """Restarted sequences come before younger ones that run; returns a limit for prefills.

        Prompts that came after the limit are held back. A sequence that decodes is home once a
        round and can be sent back then, but chunks of a prompt follow each other without a gap.
        """
        running = self._roster.running
        while running:
            sequence = self._roster.next_waiting()
            if sequence is None or running[-1] < sequence:
                break
            if not self._roster.admit(sequence):
                return sequence.arrival
        return NO_LIMIT

    def _add_decodes(self, runs: list[IssuedRun], groups: int, in_flight: AbcSequence[int]) -> int:
        """One token of each of the oldest ready sequences; returns a limit for prefills."""
        decoding = [sequence for sequence in self._roster.running if not sequence.is_prefilling]
        # Shares as equal as can be: what a returning larger group leaves behind fills up the next
        # smaller one. Whoever is ready goes at once, also as a small group, when a slot is open.
        size, num_larger = divmod(len(decoding), groups)
        size += sum(others > size for others in in_flight) < num_larger
        size = min(max(size, 1), self._token_budget)
        limit = NO_LIMIT
        for sequence in decoding:
            if len(runs) == size:
                break
            # Asked anew for each: an older one's growth may have sent this one back.
            if sequence.can_decode:
                if self._roster.grow(sequence):
                    runs.append(self._issue(sequence, 1))
                else:
                    limit = min(limit, sequence.arrival)
        return limit

    def _add_prefills(self, runs: list[IssuedRun], limit: int) -> None:
        budget = self._token_budget - len(runs)
        sequence = self._next_prefill(limit) if budget else None
        if sequence is None:
            self._chunk_tokens = 0  # the burst is over
            return
        budget = min(budget, self._choose_chunk_tokens())
        while sequence is not None:
            count = min(budget, sequence.prefill_end - sequence.issued)
            runs.append(self._issue(sequence, count))
            budget -= count
            sequence = self._next_prefill(limit) if budget else None

    def _next_prefill(self, limit: int) -> Sequence | None:
        """The oldest sequence with tokens to prefill; admits one if none that runs has any."""
        for sequence in self._roster.running:
            if sequence.is_prefilling:
                return sequence if sequence.arrival < limit else None
        # While an older one waits for room there is none for a newcomer either.
        newcomer = self._roster.next_waiting()
        if newcomer is None or not self._roster.admit(newcomer):
            return None
        return newcomer

    def _choose_chunk_tokens(self) -> int:
        """Prompt tokens that one step takes: an equal share of the present burst of prompts."""
        enough = self._token_budget * self._most_chunks
        if self._chunk_tokens < self._token_budget:
            pending = self._pending_tokens(enough)
            chunks = -(-pending // LARGE_CHUNK_TOKENS)
            chunks = min(max(chunks, self._fewest_chunks), self._most_chunks)
            share = -(-pending // chunks)
            block_tokens = self._roster.pool.block_tokens
            share = max(-(-share // block_tokens) * block_tokens, self._min_chunk_tokens)
            # It never shrinks within a burst: the rest of a prompt goes in pieces like the first.
            self._chunk_tokens = max(self._chunk_tokens, min(share, self._token_budget))
        return self._chunk_tokens

    def _pending_tokens(self, enough: int) -> int:
        """Tokens that still have to be prefilled; counting stops at `enough`."""
        pending = sum(
            sequence.prefill_end - sequence.issued
            for sequence in self._roster.running
            if sequence.is_prefilling
        )
        for sequence in self._roster.waiting():
            if pending >= enough:
                break
            pending += len(sequence.tokens)
        return pending

    def _issue(self, sequence: Sequence, count: int) -> IssuedRun:
        start = sequence.issued
        end = sequence.issued = start + count
        sequence.in_flight += 1
        planned = PlannedRun(
            sequence=sequence.request.sequence,
            start=start,
            tokens=tuple(sequence.tokens[start:end]),
            blocks=tuple(sequence.blocks[: self._roster.pool.blocks_for(end)]),
            rope_length=sequence.rope_base,
            draws=end == len(sequence.tokens) and sequence.request.max_new_tokens > 0,
            draw=sequence.num_generated,
            state_slot=sequence.state_slot,
            scoring=_scoring(sequence, start, end),
        )
        return IssuedRun(sequence, sequence.life, planned, self._roster.publish(sequence))


def _scoring(sequence: Sequence, start: int, end: int) -> ScoredRows | None:
    """Which rows of a run are to be scored: those of the prompt that have no score yet.

    Runs of one life follow each other, so what is on its way is never asked for again.
    """
    first, stop = max(start, sequence.scored), min(end, sequence.score_end)
    if first >= stop:
        return None
    next_token = sequence.tokens[end] if stop == end else None
    return ScoredRows(first - start, stop - first, next_token)
