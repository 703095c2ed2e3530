"""How the work is shared over ranks, as options; for running here and for submitting."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

import click

from engine.jobs.axonn_grid import AXES, Parallelism

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT: Final = Parallelism()

OPTIONS: Final = (
    click.option(
        "--tensor-parallelism",
        type=int,
        default=DEFAULT.tensor,
        show_default=True,
        metavar="T",
        help="Ranks that hold one copy of the model together.",
    ),
    click.option(
        "--data-parallelism",
        type=int,
        metavar="D",
        help="Copies of the model; T x D is the number of ranks. Default: ranks / T.",
    ),
    click.option(
        "--parallelism-axis",
        type=click.Choice(AXES),
        default=DEFAULT.axis,
        show_default=True,
        help="What a layer is split by: its outputs, its inputs, or its storage alone.",
    ),
)


def parallelism_options(command: Command) -> Command:
    """Add them; the command gets them as `parallelism`."""

    @wraps(command)
    def with_parallelism(*args: Any, **values: Any) -> Any:
        parallelism = Parallelism(
            tensor=values.pop("tensor_parallelism"),
            data=values.pop("data_parallelism"),
            axis=values.pop("parallelism_axis"),
        )
        return command(*args, parallelism=parallelism, **values)

    decorated: Any = with_parallelism
    for option in reversed(OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
