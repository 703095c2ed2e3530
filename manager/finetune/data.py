"""`manager finetune data`: what would be learnt from some data, before anything is trained."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from engine.jobs.settings import DataSettings, JobSettings, OutputSettings, TrainingSettings
from manager.finetune.options import data_options
from manager.finetune.progress import Shown

if TYPE_CHECKING:
    from engine.jobs.job import Materials


@click.command()
@data_options
@click.option(
    "--show", type=click.IntRange(min=0), default=0, metavar="N", help="Print the first N rows."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def data(data: DataSettings, base_model: str | None, seed: int, show: int, as_json: bool) -> None:
    """Show counts and lengths of data, and what was dropped and why.

    Lengths are in tokens of --base-model. With --show, what is learnt stands in [[ ]].
    """
    from engine.jobs.job import gather
    from engine.jobs.stopping import StopRequest

    settings = JobSettings(
        method="data",
        base_model=base_model,
        data=data,
        training=TrainingSettings(seed=seed),
        output=OutputSettings(save_dir=""),
    )
    with Shown(1, 1) as shown:
        materials = gather(settings, _Quiet(shown), StopRequest())
    rows = [text_of(materials, index) for index in range(min(show, len(materials.dataset.train)))]
    summary = materials.dataset.summary.to_json()
    if as_json:
        said = {"base_model": materials.checkpoint.name, **summary}
        if show:
            said["rows"] = rows
        click.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return
    _print_tables(materials, summary)
    for number, row in enumerate(rows, start=1):
        click.echo(f"--- row {number}\n{row}")


class _Quiet:
    """Progress only; the tables say the rest."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def busy(self, text: str) -> None:
        """On a terminal."""
        if sys.stderr.isatty():
            self._shown.busy(text)

    def say(self, line: str) -> None:
        """Said by the tables."""

    def event(self, event: Any) -> None:
        """Nothing is trained."""


def text_of(materials: Materials, index: int) -> str:
    """A training row as text, what is learnt of it in [[ ]]."""
    from itertools import groupby

    from engine.jobs.tokenizing import NOT_LEARNT

    row = materials.dataset.train[index]
    pairs = zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
    text = ""
    for is_learnt, group in groupby(pairs, key=lambda it: it[1] != NOT_LEARNT):
        ids = [token_id for token_id, _ in group]
        part = " ".join(map(str, ids))
        if materials.tokenizer is not None:
            part = materials.tokenizer.decode(ids)
        text += f"[[{part}]]" if is_learnt else part
    return text


def _print_tables(materials: Materials, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    sources = Table("source", "split", "shape", "samples", box=None)
    for source in summary["sources"]:
        sources.add_row(
            source["name"], source["split"], source["shape"] or "-", str(source["samples"])
        )
    console.print(sources)
    columns = ["split", "samples", "rows", "tokens", "learnt", "p50", "p95", "longest"]
    splits = Table(box=None)
    for column in columns:
        splits.add_column(column, justify="left" if column == "split" else "right")
    for name in ("train", "validation"):
        split = summary[name]
        if split is None:
            continue
        numbers = [split[it] for it in ("samples", "rows", "tokens", "learnt_tokens")]
        lengths = [split["lengths"][it] for it in ("p50", "p95", "max")]
        splits.add_row(name, *(f"{it:,}" for it in (*numbers, *lengths)))
    console.print(splits)
    facts = [f"tokens of {materials.checkpoint.name}, at most {summary['max_length']} a row"]
    if summary["template"] is not None:
        facts.append(f"{summary['template']} template")
    if summary["train"]["fill"] is not None:
        facts.append(f"packed rows are {100 * summary['train']['fill']:.0f} % full")
    console.print("; ".join(facts), markup=False)
    for sentence in materials.dataset.summary.sentences():
        console.print(sentence, markup=False)
    if summary["languages"]:
        said = ", ".join(
            f"{name or '(none)'} {count}" for name, count in summary["languages"].items()
        )
        console.print(f"languages: {said}", markup=False)
