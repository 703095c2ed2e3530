"""Options of running a file of prompts, which are the same here and inside a job."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

DEFAULT_BATCH_SIZE: Final = 16

BATCH_SIZE: Final = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=DEFAULT_BATCH_SIZE,
    show_default=True,
    metavar="N",
    help="How many sequences run at once.",
)
ITERS: Final = click.option(
    "--iters",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Run all prompts so often. Results are the first run's, metrics of all.",
)
OUTPUT: Final = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="F.jsonl",
    help="Where results go, in input order; what was interrupted goes on there.",
)
OVERWRITE: Final = click.option(
    "--overwrite", is_flag=True, help="Begin anew where results are there already."
)
METRICS: Final = click.option(
    "--metrics",
    type=click.Path(path_type=Path),
    metavar="F.json",
    help="Write tokens/s, latencies, and what workers and manager used.",
)
CHAT: Final = click.option(
    "--chat", is_flag=True, help="A prompt is a message, in the model's chat template."
)
SYSTEM: Final = click.option(
    "--system", metavar="TEXT", help="With --chat: what the model is told first."
)
