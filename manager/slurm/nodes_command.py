"""`manager nodes`: what the nodes of a partition have, and how many of them a model needs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from manager.options import precision_options
from manager.slurm.client import run_slurm
from manager.slurm.nodes import Node, Partition, fold_names, parse_nodes, parse_partitions
from manager.slurm.site import SiteOption, resolve_site
from manager.tables import size, table
from proto.errors import UsageError
from proto.settings import parse_byte_size

if TYPE_CHECKING:
    from manager.slurm.model_needs import Need

TITLES: Final = ("NODES", "STATE", "CPUS IDLE", "MEMORY FREE", "GPUS IDLE", "NAMES")


@click.command()
@click.option(
    "--profile",
    cls=SiteOption,
    metavar="NAME",
    help="One of [slurm.profiles] in comboio.toml.",
)
@click.option(
    "--partition",
    "-p",
    cls=SiteOption,
    metavar="NAME",
    help="Whose nodes. Default: the one in [slurm] of comboio.toml, else the cluster's default.",
)
@click.option("--model", metavar="DIR|HUB_ID|FILE.gguf", help="How many nodes does this one need?")
@click.option(
    "--context", type=click.IntRange(min=1), metavar="TOKENS", help="Reckon KV for so many."
)
@precision_options
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    help="Of one GPU, as 40GB: Slurm does not know. Then a GPU holds a section, not a node.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def nodes(
    profile: str | None,
    partition: str | None,
    model: str | None,
    context: int | None,
    dtype: str,
    quantize: str,
    kv_quantize: str,
    gpu_memory: str | None,
    as_json: bool,
) -> None:
    """Show what nodes have, and how many a model needs."""
    if model is None:
        for option in ("--context", "--dtype", "--quantize", "--kv-quantize", "--gpu-memory"):
            _refuse(option, "has no effect without --model: name the model.")
    elif model.endswith(".gguf"):
        for option in ("--dtype", "--quantize"):
            _refuse(option, "has no effect: weights in a .gguf file have the types they have.")
        _refuse("--kv-quantize", "has no effect: KV of a .gguf file is reckoned in float16.")
    gpu_bytes = None if gpu_memory is None else _bytes(gpu_memory)
    site = resolve_site({"partition": partition}, profile, environ=os.environ)
    chosen, found = look_up(site.partition)
    need = None
    if model is not None:
        from manager.slurm.model_needs import needs, open_model  # torch loads behind it

        opened = open_model(
            model, dtype=dtype, context=context, quantize=quantize, kv_quantize=kv_quantize
        )
        need = needs(opened, found, gpu_bytes=gpu_bytes)
    if as_json:
        click.echo(json.dumps(_as_json(chosen, found, need), ensure_ascii=False))
        return
    lines = describe(chosen, found)
    if need is not None and model is not None:
        lines += ["", *explain(need, chosen, found, model, on_gpus_asked=gpu_bytes is not None)]
    click.echo("\n".join(lines))


def look_up(name: str | None) -> tuple[Partition | None, list[Node]]:
    """A partition, the default one, or None where there is no default; and its nodes, or all.

    Raises:
        UsageError: there is no partition with that name.
        JobError: Slurm cannot be asked.
    """
    partitions = parse_partitions(run_slurm(["scontrol", "--all", "show", "partition"]))
    nodes = parse_nodes(run_slurm(["scontrol", "--all", "--details", "show", "node"]))
    if name is None:
        chosen = next((it for it in partitions if it.is_default), None)
    else:
        chosen = next((it for it in partitions if it.name == name), None)
        if chosen is None:
            names = [it.name for it in partitions]
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
            raise UsageError(f"--partition {name}: the cluster has no such partition; {hint}")
    if chosen is None:
        return None, nodes
    return chosen, [node for node in nodes if chosen.name in node.partitions]


def describe(partition: Partition | None, nodes: Sequence[Node]) -> list[str]:
    """The nodes for people: those that are alike share a line."""
    if not nodes:
        return [f"{_where(partition)} has no nodes."]
    cells = sorted((_cells(node), node.name) for node in nodes)
    rows = []
    for alike, group in groupby(cells, key=lambda it: it[0]):
        names = [name for _, name in group]
        rows.append((str(len(names)), *alike, fold_names(names)))
    reasons = sorted({(node.reason, node.name) for node in nodes if node.reason})
    return [
        _title(partition, nodes),
        "",
        table(TITLES, rows),
        *(
            f"{fold_names(name for _, name in group)}: {reason}"
            for reason, group in groupby(reasons, key=lambda it: it[0])
        ),
    ]


def explain(
    need: Need,
    partition: Partition | None,
    nodes: Sequence[Node],
    model: str,
    *,
    on_gpus_asked: bool,
) -> list[str]:
    """The rule with its numbers, and whether so many nodes are idle."""
    rule = (
        f"{need.model}: {size(need.weights_bytes)} of weights + {size(need.kv_bytes)} of KV for "
        f"{need.context} tokens, +20 %"
    )
    if need.num_nodes is None:
        return [
            f"{rule}: does not fit. Cut into {_count(need.num_sections, 'section')}, the largest "
            f"needs {size(need.section_bytes)}, and the largest {need.place} of "
            f"{_where(partition)} has {size(need.largest_place_bytes)}."
        ]
    assert need.place_bytes is not None  # it fits somewhere
    holds = f"of {size(need.place_bytes)} (each {size(need.section_bytes)})"
    if need.place == "GPU":
        gpus = f"{_count(need.num_sections, 'GPU')} {holds}"
        lines = [f"{rule}: {gpus}, on {_count(need.num_nodes, 'node')}"]
    else:
        lines = [f"{rule}: {_count(need.num_nodes, 'node')} {holds}"]
    lines.append(_whether_now(need, model))
    most = None if partition is None else partition.max_nodes
    if most is not None and need.num_nodes > most:
        lines.append(f"But {_where(partition)} gives a job {_count(most, 'node')} at most.")
    if need.place == "node" and any(node.gpus for node in nodes) and not on_gpus_asked:
        lines.append(
            "That is main memory: Slurm does not know how much the GPUs have; to reckon with it, "
            "pass --gpu-memory, for example 40GB."
        )
    return lines


def _whether_now(need: Need, model: str) -> str:
    assert need.num_nodes is not None
    idle = (
        f"{need.idle_nodes or 'none'} of that size {'is' if need.idle_nodes == 1 else 'are'} idle"
    )
    if not need.fits_now:
        return f"Now {idle}: a job for {_count(need.num_nodes, 'node')} would wait."
    if model.endswith(".gguf"):
        return f"Now {idle}: a job for {_count(need.num_nodes, 'node')} could start at once."
    words = ["manager", "submit", "pipeline", "--nodes", str(need.num_nodes)]
    if need.num_sections > need.num_nodes:
        words += ["--tasks-per-node", str(-(-need.num_sections // need.num_nodes))]
    return f"Now {idle}: `{shlex.join([*words, '--model', model])} ...` could start at once."


def _as_json(
    partition: Partition | None, nodes: Sequence[Node], need: Need | None
) -> dict[str, Any]:
    return {
        "partition": None if partition is None else asdict(partition),
        "nodes": [
            {
                **asdict(node),
                "is_usable": node.is_usable,
                "is_idle": node.is_idle,
                "idle_cpus": node.idle_cpus,
                "idle_gpus": node.idle_gpus,
                "free_memory_bytes": node.free_memory_bytes,
            }
            for node in nodes
        ],
        "need": None if need is None else asdict(need),
    }


def _cells(node: Node) -> tuple[str, str, str, str]:
    gpus = f"{node.idle_gpus}/{node.gpus} {'+'.join(node.gpu_types)}".strip() if node.gpus else "-"
    return (
        node.condition,
        f"{node.idle_cpus}/{node.cpus}",
        f"{size(node.free_memory_bytes)}/{size(node.memory_bytes)}",
        gpus,
    )


def _title(partition: Partition | None, nodes: Sequence[Node]) -> str:
    idle = sum(node.is_idle for node in nodes)
    facts = [f"{_count(len(nodes), 'node')}, {idle} idle"]
    if partition is not None:
        if partition.state != "UP":
            facts.append(f"closed ({partition.state})")
        if partition.max_nodes is not None:
            facts.append(f"{_count(partition.max_nodes, 'node')} a job at most")
        if partition.max_time not in ("", "UNLIMITED"):
            facts.append(f"time limit {partition.max_time}")
    default = " (the default)" if partition is not None and partition.is_default else ""
    return f"{_where(partition)}{default}: {', '.join(facts)}"


def _where(partition: Partition | None) -> str:
    return "the cluster" if partition is None else f"partition {partition.name}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _bytes(gpu_memory: str) -> int:
    try:
        found = parse_byte_size(gpu_memory)
    except ValueError as exc:
        raise UsageError(f"--gpu-memory: {exc}.") from exc
    if found < 1:
        raise UsageError(f"--gpu-memory {gpu_memory}: a GPU has more than that.")
    return found


def _refuse(option: str, why: str) -> None:
    """Unless it is a setting, which is for other commands too."""
    name = option.removeprefix("--").replace("-", "_")
    source = click.get_current_context().get_parameter_source(name)
    if source is ParameterSource.COMMANDLINE:
        raise UsageError(f"{option} {why}")
