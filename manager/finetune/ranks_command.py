"""A command that is started once a rank: what is wrong with its words is said once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from manager.finetune.ranks_launch import detect
from proto.errors import Error

LATER_S: Final = 2.0


class RankCommand(click.Command):
    """Click's, started once a rank."""

    def make_context(self, *args: Any, **values: Any) -> click.Context:
        """As click does; without a word in all ranks but the first."""
        with _first_rank_speaks():
            return super().make_context(*args, **values)

    def invoke(self, ctx: click.Context) -> Any:
        """The same; once the ranks have met, they agree on who speaks."""
        with _first_rank_speaks():
            return super().invoke(ctx)


@contextmanager
def _first_rank_speaks() -> Iterator[None]:
    from manager.finetune.ranks_link import LostError

    try:
        yield
    except LostError:
        raise  # what this rank alone knows
    except (click.ClickException, Error) as exc:
        if detect(os.environ).rank == 0:
            raise
        # A launcher ends the others when one leaves with an error.
        time.sleep(LATER_S)
        os._exit(exc.exit_code)
