"""`manager submit llama-server`: a configuration becomes a call of sbatch.

What `config.json` says of the job (job_name, nodes, ntasks, time, output_log, venv_dir,
sbatch_script) becomes flags; the job itself reads the same file again for the rest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from manager.llama_server.options import config_options
from manager.slurm.pipeline_job import words_of
from manager.slurm.scripts import Submission, find_script
from manager.slurm.site import Site, site_options
from manager.slurm.submission_options import (
    Asked,
    own_options,
    publish,
    submission_options,
)
from proto.errors import UsageError

if TYPE_CHECKING:
    from manager.llama_server.config import LlamaServerConfig

SCRIPT: Final = "llama-server.sbatch"
# What the job's flags say; the rest of the options goes to the job as it was typed.
FLAG_KEYS: Final = {
    "job_name",
    "time",
    "venv_dir",
    "sbatch_script",
    "output_log",
    "nodes",
    "ntasks",
}
# What scripts that people have from before expect: variable -> key.
VARIABLES: Final = {
    "DIR_LLAMA_SCRIPT": "dir_llama_script",
    "MODEL": "model",
    "PORT_SERVER": "port_server",
    "PORT_RPC": "port_rpc",
    "VENV_DIR": "venv_dir",
    "PROMPT_DIR": "prompt_dir",
    "RESULT_FILE": "result_file",
}


@click.command()
@config_options(job=True, leave_out=("job_name", "time", "venv_dir"))
@click.option("--overwrite", is_flag=True, help="Begin --prompts anew where results are there.")
@site_options
@submission_options
@click.pass_context
def llama_server(
    ctx: click.Context, config: LlamaServerConfig, overwrite: bool, site: Site, asked: Asked
) -> None:
    """Run llama-server on the first node of a Slurm job, with an rpc-server on each other node.

    What it is told stands in --config FILE, a JSON or TOML file with these keys, or in options of
    the same names.
    """
    from manager.llama_server.gguf_file import read_model
    from manager.llama_server.question import check_places, read_question

    question = read_question(config)
    check_places(config, question, as_json=False)
    read_model(config.model)
    publish(
        Submission(
            backend="llama-server",
            script=_script(config),
            name=asked.name or config.job_name,
            site=_site(ctx, site, config),
            flags=(f"--nodes={config.nodes}", "--ntasks-per-node=1", *asked.flags()),
            words=tuple(_words(ctx, config)),
            variables={**asked.variables(), **_variables(config)},
            log=None if config.output_log is None else str(config.output_log),
        ),
        asked,
    )


def _site(ctx: click.Context, site: Site, config: LlamaServerConfig) -> Site:
    """The configuration's own words about the job win over comboio.toml's, not over typed ones."""

    def is_typed(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    if config.time is not None and not is_typed("time"):
        site = replace(site, time=config.time)
    if config.venv_dir is not None and not (is_typed("venv") or is_typed("conda_env")):
        site = replace(site, venv=config.venv_dir, conda_env=None)
    return site


def _script(config: LlamaServerConfig) -> Path:
    if config.sbatch_script is None:
        return find_script(SCRIPT)
    if not config.sbatch_script.is_file():
        raise UsageError(
            f"sbatch_script is {config.sbatch_script}, and there is no such file: leave it out to "
            f"submit {find_script(SCRIPT)}."
        )
    return config.sbatch_script


def _words(ctx: click.Context, config: LlamaServerConfig) -> list[str]:
    """What was typed, for the job; paths are absolute there."""
    from manager.llama_server.config import PATH_KEYS

    words = []
    for word in words_of(ctx, own_options(ctx) - FLAG_KEYS):
        name, equals, _ = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if equals and key in PATH_KEYS:
            word = f"{name}={getattr(config, key)}"
        words.append(word)
    # Options may have changed what the file says of these.
    return [*words, f"--nodes={config.nodes}", f"--ntasks={config.nodes}"]


def _variables(config: LlamaServerConfig) -> dict[str, str]:
    """For a script of the user's own; ours asks for none of them."""
    if config.sbatch_script is None:
        found = {"LLAMA_CPP_DIR": os.environ.get("LLAMA_CPP_DIR", "")}
        return {key: value for key, value in found.items() if value}
    values = {name: getattr(config, key) for name, key in VARIABLES.items()}
    return {name: str(value) for name, value in values.items() if value is not None}
