"""How the processes of an AxoNN run share the work: tensor x data, and what tensor splits.

Pure arithmetic, checked when it is made; knows no launcher and no library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from proto.errors import UsageError

AXES: Final = ("row", "column", "depth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """What is asked for; `data` may follow from the number of processes."""

    tensor: int = 1  # processes that hold one copy of the model together
    data: int | None = None  # such copies; None: as many as there are processes for
    axis: str = "depth"  # what a layer is split by

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise UsageError(f"--parallelism-axis {self.axis!r} is none of {', '.join(AXES)}.")
        for name, value in (
            ("--tensor-parallelism", self.tensor),
            ("--data-parallelism", self.data),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} must be 1 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a run has: tensor x data processes."""

    tensor: int
    data: int
    axis: str

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tensor * self.data

    @property
    def rows(self) -> int:
        """Parts of a layer's outputs."""
        return self.tensor if self.axis == "row" else 1

    @property
    def columns(self) -> int:
        """Parts of a layer's inputs."""
        return self.tensor if self.axis == "column" else 1

    @property
    def depth(self) -> int:
        """Parts that a layer is stored in, and put together for each use."""
        return self.tensor if self.axis == "depth" else 1

    @property
    def sentence(self) -> str:
        """`tensor 2 by depth x data 4`."""
        return f"tensor {self.tensor} by {self.axis} x data {self.data}"

    def divides(self, num_inputs: int, num_outputs: int) -> bool:
        """Whether a layer of this size splits into equal parts."""
        if num_inputs % self.columns or num_outputs % self.rows:
            return False
        return num_inputs // self.columns * (num_outputs // self.rows) % self.depth == 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def make_grid(wanted: Parallelism, num_ranks: int, launcher: str) -> Grid:
    """The grid of so many processes.

    Args:
        launcher: what started them, for the sentence: "mpirun", or "nothing that starts several".
    Raises:
        UsageError: tensor x data is another number; says the numbers.
    """
    tensor, data = wanted.tensor, wanted.data
    were = "1 rank was" if num_ranks == 1 else f"{num_ranks} ranks were"
    if data is None:
        if num_ranks % tensor:
            raise UsageError(
                f"--tensor-parallelism {tensor} does not divide the ranks: {were} started by "
                f"{launcher}; start a multiple of {tensor}."
            )
        data = num_ranks // tensor
    if tensor * data != num_ranks:
        raise UsageError(
            f"--tensor-parallelism {tensor} x --data-parallelism {data} takes {tensor * data} "
            f"ranks, and {were} started by {launcher}: start {tensor * data}, or pass two numbers "
            f"whose product is {num_ranks}."
        )
    return Grid(tensor=tensor, data=data, axis=wanted.axis)
