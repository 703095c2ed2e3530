"""Which layers each stage holds, and whether workers make up a chain.

Pure arithmetic and comparison: costs in, sections out; what workers say of themselves in, their
order out. Reads no file and opens no link.
"""

from __future__ import annotations

import re
import shlex
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from proto.errors import ModelError, SplitError
from proto.messages import WorkerFacts


@dataclass(frozen=True, slots=True, order=True)
class Section:
    """A contiguous half-open range of decoder layers."""

    start: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


# --- cutting a model -------------------------------------------------------------------------


def split_layers(
    layer_costs: Sequence[float], num_sections: int, head_cost: float = 0.0
) -> list[Section]:
    """Cut the layers so that the most expensive section is as cheap as can be.

    Args:
        layer_costs: one a layer, not negative; bytes, seconds, or any mixture of them.
        head_cost: of what follows the last layer (final norm, lm_head): the last section's.
    Returns:
        `num_sections` sections in order, each with a layer at least. Of several cuts that are
        equally good, the one with the most even numbers of layers, larger ones first.
    Raises:
        SplitError: there are fewer layers than sections, or no section is asked for.
    """
    num_layers = len(layer_costs)
    if num_sections < 1:
        raise SplitError(f"cannot split over {num_sections} sections: pass --sections 1 or more")
    if num_sections > num_layers:
        raise SplitError(
            f"cannot split {num_layers} layers over {num_sections} sections: a section needs at "
            f"least one layer; pass --sections {num_layers} or fewer"
        )
    cut = _Cut(layer_costs, head_cost)
    # Sums of equal costs differ in their last bits; that must not decide between cuts.
    return cut.most_even(num_sections, cut.least_limit(num_sections) * (1 + 1e-9))


def parse_layers(text: str, num_layers: int) -> Section:
    """What `--layers START:END` means for a model of `num_layers`."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise SplitError(
            f"--layers {text!r} is not START:END: write two whole numbers, the end not included, "
            f"for example 0:{num_layers}"
        )
    section = Section(int(match[1]), int(match[2]))
    if section.num_layers < 1:
        raise SplitError(
            f"--layers {section} holds no layer: the end is not included, so it must be larger "
            "than the start"
        )
    if section.end > num_layers:
        raise SplitError(
            f"--layers {section} goes past the model's end: it has {num_layers} layers, so the "
            f"end can be {num_layers} at most"
        )
    return section


class _Cut:
    """The costs of one model, and the searches over them."""

    def __init__(self, layer_costs: Sequence[float], head_cost: float) -> None:
        self._num_layers = len(layer_costs)
        self._before = [0.0, *accumulate(layer_costs)]
        self._head_cost = head_cost

    def cost(self, start: int, end: int) -> float:
        head_cost = self._head_cost if end == self._num_layers else 0.0
        return self._before[end] - self._before[start] + head_cost

    def least_limit(self, num_sections: int) -> float:
        """The smallest cost that no section needs to exceed; it is that of some section."""
        ends = range(1, self._num_layers + 1)
        limits = sorted({self.cost(start, end) for end in ends for start in range(end)})
        return limits[bisect_left(limits, True, key=lambda limit: self._fits(num_sections, limit))]

    def _fits(self, num_sections: int, limit: float) -> bool:
        """Whether `num_sections` or fewer can stay within the limit: filled up from the end on."""
        end = self._num_layers
        for _ in range(num_sections):
            start = end
            while start > 0 and self.cost(start - 1, end) <= limit:
                start -= 1
            if start in (0, end):
                return start == 0
            end = start
        return False

    def most_even(self, num_sections: int, limit: float) -> list[Section]:
        """Of all cuts within the limit the one with the smallest sum of squared layer counts."""
        # least[start]: (that sum, end of the first section) for the layers from `start` on, cut
        # into as many sections as rounds have passed; absent where the limit forbids it.
        rounds: list[dict[int, tuple[int, int]]] = []
        least: dict[int, tuple[int, int]] = {self._num_layers: (0, self._num_layers)}
        for _ in range(num_sections):
            rounds.append(least)
            least = self._one_section_more(least, limit)
        rounds.append(least)
        sections, start = [], 0
        for ends in reversed(rounds[1:]):
            end = ends[start][1]
            sections.append(Section(start, end))
            start = end
        return sections

    def _one_section_more(
        self, least: dict[int, tuple[int, int]], limit: float
    ) -> dict[int, tuple[int, int]]:
        more: dict[int, tuple[int, int]] = {}
        for start in range(self._num_layers):
            for end in range(start + 1, self._num_layers + 1):
                if end < self._num_layers and self.cost(start, end) > limit:
                    break  # only the head can make a longer one dearer still, never cheaper
                if end in least and self.cost(start, end) <= limit:
                    squares = least[end][0] + (end - start) ** 2
                    if start not in more or squares <= more[start][0]:
                        more[start] = (squares, end)
        return more


# --- making a chain --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that answered."""

    address: str  # as the user gave it
    facts: WorkerFacts

    @property
    def section(self) -> Section:
        return Section(self.facts.start_layer, self.facts.end_layer)

    def __str__(self) -> str:
        return f"worker {self.address} (layers {self.section})"


@dataclass(frozen=True, slots=True)
class Chain:
    """Workers in the order in which a step passes them; together they hold every layer once."""

    stages: tuple[Candidate, ...]
    spares: tuple[Candidate, ...] = ()  # each holds a section that a stage holds too
    others: tuple[Candidate, ...] = ()  # hold layers that this chain cuts elsewhere


def check_chain(workers: Sequence[Candidate]) -> Chain:
    """Order the workers into a chain; of several with one section, the first given is the stage.

    Where they could make up several chains, the one whose largest section is smallest is taken.

    Raises:
        ModelError: they hold different models, or do not hold them alike.
        SplitError: a section is missing, or they do not fit together; says which and whose.
    """
    if not workers:
        raise SplitError("no worker was given: pass --workers HOST:PORT,HOST:PORT or --spawn N")
    for worker in workers[1:]:
        _check_same_model(workers[0], worker)
    holders: dict[Section, list[Candidate]] = {}
    for worker in workers:
        holders.setdefault(worker.section, []).append(worker)
    path = _find_path(holders, workers[0].facts.num_layers)
    if path is None:
        raise SplitError(_why_no_path([holders[section][0] for section in sorted(holders)]))
    spares = [spare for section in path for spare in holders[section][1:]]
    others = [worker for worker in workers if worker.section not in path]
    return Chain(tuple(holders[section][0] for section in path), tuple(spares), tuple(others))


def _find_path(sections: Iterable[Section], num_layers: int) -> tuple[Section, ...] | None:
    """Sections that follow one another from the first layer to the last; None if there are none."""
    # By the layer that a path ends before: (its largest section, the path).
    best: dict[int, tuple[int, tuple[Section, ...]]] = {0: (0, ())}
    for section in sorted(sections):  # what ends where this one starts has been seen
        if section.start in best:
            largest, path = best[section.start]
            found = max(largest, section.num_layers), (*path, section)
            best[section.end] = min(best.get(section.end, found), found)
    return best[num_layers][1] if num_layers in best else None


def _why_no_path(stages: Sequence[Candidate]) -> str:
    """What is wrong with workers of different sections, in order, that make up no chain."""
    for first, second in pairwise(stages):
        if second.section.start < first.section.end:
            return (
                f"{first} and {second} overlap: start them all with the same --sections, or with "
                "--layers that end where the next begin"
            )
    return _say_what_is_missing(stages, _find_gaps(stages))


def _check_same_model(first: Candidate, second: Candidate) -> None:
    ours, theirs = first.facts, second.facts
    if ours.fingerprint != theirs.fingerprint or ours.num_layers != theirs.num_layers:
        names = (ours.model, theirs.model)
        if ours.model == theirs.model:  # one name, different files
            names = (
                f"{ours.model} {ours.fingerprint[:8]}",
                f"{theirs.model} {theirs.fingerprint[:8]}",
            )
        raise ModelError(
            f"worker {first.address} holds the model {names[0]}, worker {second.address} holds "
            f"{names[1]}: start them all with the same --model"
        )
    if ours.dtype != theirs.dtype:
        raise ModelError(
            f"worker {first.address} computes in {ours.dtype}, worker {second.address} in "
            f"{theirs.dtype}: start them all with the same --dtype"
        )
    if ours.block_tokens != theirs.block_tokens:
        raise ModelError(
            f"worker {first.address} keeps {ours.block_tokens} tokens in a KV block, worker "
            f"{second.address} {theirs.block_tokens}: run the same version of comboio on both"
        )


def _find_gaps(stages: Sequence[Candidate]) -> list[Section]:
    beyond = Section(stages[0].facts.num_layers, stages[0].facts.num_layers)
    sections = [Section(0, 0), *(stage.section for stage in stages), beyond]
    return [
        Section(before.end, behind.start)
        for before, behind in pairwise(sections)
        if before.end < behind.start
    ]


def _say_what_is_missing(stages: Sequence[Candidate], gaps: Sequence[Section]) -> str:
    """One sentence with the sections that nobody holds, and the commands that start them."""
    model_path = stages[0].facts.model_path
    model = f" --model {shlex.quote(model_path)}" if model_path else ""
    missing = _missing_indices(stages)
    num_sections = stages[0].facts.num_sections
    if len(missing) == len(gaps):
        names = [
            f"section {index} of {num_sections}, layers {gap},"
            for index, gap in zip(missing, gaps, strict=True)
        ]
        options = [f"--sections {num_sections} --index {index}" for index in missing]
    elif missing:  # neighbours that are missing together: where one ends the workers know
        names = [f"layers {gap}" for gap in gaps]
        options = [f"--sections {num_sections} --index {index}" for index in missing]
    else:
        names = [f"layers {gap}" for gap in gaps]
        options = [f"--layers {gap}" for gap in gaps]
    commands = " and ".join(f"`worker {option}{model}`" for option in options)
    verb = "is" if len(gaps) == 1 and len(missing) == 1 else "are"
    held = ", ".join(stage.address + " holds " + str(stage.section) for stage in stages)
    return (
        f"{' and '.join(names)} {verb} missing from the chain ({held} of "
        f"{stages[0].facts.num_layers} layers): start {commands}, and add the address to --workers"
    )


def _missing_indices(stages: Sequence[Candidate]) -> list[int]:
    """Sections that nobody holds, where all workers were started with the same --sections."""
    counts = {stage.facts.num_sections for stage in stages}
    num_sections = stages[0].facts.num_sections
    if counts != {num_sections} or num_sections is None:
        return []
    held = {stage.facts.section for stage in stages}
    return [index for index in range(num_sections) if index not in held]
