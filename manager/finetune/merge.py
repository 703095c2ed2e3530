"""`manager finetune merge`: add an adapter to its base model, as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from manager.finetune.extras import require
from proto.errors import UsageError


@click.command()
@click.option(
    "--adapter",
    "--lora-adapters",
    "adapter",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder with adapter_config.json.",
)
@click.option(
    "--output",
    "--save-dir",
    "output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the merged model goes.",
)
@click.option(
    "--base-model",
    "--model-name",
    "--model",
    "base_model",
    metavar="DIR|HUB_ID",
    help="Default: what the adapter names.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that --output holds.")
def merge(adapter: Path, output: Path, base_model: str | None, overwrite: bool) -> None:
    """Add an adapter to the weights of its base model, in the base model's own dtype."""
    check_output(output, overwrite=overwrite)
    require("peft", "manager finetune merge")
    from engine.jobs.job import open_base
    from engine.jobs.saving import base_of, check_adapter, save_merged

    adapter = adapter.expanduser().resolve()
    config = check_adapter(adapter)
    checkpoint = open_base(base_model or base_of(config, adapter))
    for what, folder in (("the base model", checkpoint.folder), ("the adapter", adapter)):
        if output.resolve() == folder.resolve():
            raise UsageError(f"--output {output} is the folder of {what}: name another one.")
    save_merged(checkpoint, adapter, output)
    click.echo(f"merged_model {output}")


def check_output(output: Path, *, overwrite: bool) -> None:
    """A folder that is not there, or empty, or a checkpoint that may be replaced.

    Raises:
        UsageError: something else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"--output {output} is not empty: pass --overwrite to replace it, or name another."
        )
    if not (output / "config.json").is_file():
        raise UsageError(
            f"--overwrite replaces a checkpoint, and {output} holds none (no config.json): name "
            "another --output."
        )
