"""`manager llama-server run`: options become a configuration; what happens stands in `run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from manager import event_loop
from manager.cli import Interrupted
from manager.llama_server.options import config_options
from manager.output import Notices

if TYPE_CHECKING:
    from manager.llama_server.config import LlamaServerConfig


@click.command()
@config_options()
@click.option("--overwrite", is_flag=True, help="Begin --prompts anew where results are there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
def run(config: LlamaServerConfig, overwrite: bool, as_json: bool) -> None:
    """Run llama-server here, with rpc-servers on loopback, ask it, and end it all.

    What it is told stands in --config FILE, a JSON or TOML file with these keys, or in options of
    the same names. With --nodes N there are N-1 rpc-servers, which hold the model's layers. The
    answer goes to stdout as it comes, and to --result-file.
    """
    from manager.llama_server.asking import Asking
    from manager.llama_server.processes import LogFile
    from manager.llama_server.question import read_question
    from manager.llama_server.run import Run

    question, notices = read_question(config), Notices()
    asking = Asking(config, question, notices, overwrite=overwrite, as_json=as_json)
    with LogFile(_log_path(config)) as log, asking:
        running = Run(config, question, asking, log, notices)
        try:
            event_loop.run(running.run())
        except Interrupted as exc:
            if running.is_kept:  # to be interrupted is how it ends
                return
            if asking.kept:
                exc.args = (f"interrupted: {asking.kept}",)
            raise


def _log_path(config: LlamaServerConfig) -> Path | None:
    """`output_log` without what Slurm would fill in."""
    path = config.output_log
    if path is None:
        return None
    return path.with_name(path.name.replace("%j", "here").replace("%x", config.job_name))
