"""One of several ranks: what AxoNN's shards compute, against the whole model in the same process.

Started by mpirun with the folder of a tiny model; the first rank prints what it found as JSON.
Every axis in turn, as starting processes takes longer than all the rest.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpoint import Checkpoint
from engine.jobs.axonn_grid import AXES, Parallelism, make_grid
from engine.jobs.axonn_layers import gather_weight, is_sharded, shard
from engine.jobs.axonn_library import start_axonn
from engine.jobs.axonn_ranks import AxonnRanks
from engine.jobs.base_model import Placement, load_base
from engine.jobs.lora_config import adapt, trainable_parameters
from engine.jobs.settings import LoraSettings
from manager.finetune.ranks_launch import detect
from manager.finetune.ranks_meeting import meet
from manager.finetune.ranks_place import find_place

CPU = torch.device("cpu")
MAX_NORM = 0.5


def main(folder: Path) -> None:
    """Probe all axes."""
    launch = detect(os.environ)
    meeting = meet(launch, find_place(launch, os.environ))
    dist.init_process_group(
        "gloo", store=meeting.store, rank=launch.rank, world_size=launch.num_ranks
    )
    found = {axis: probe(folder, axis, launch.num_ranks) for axis in AXES}
    dist.destroy_process_group()
    if launch.rank == 0:
        print(json.dumps(found), flush=True)
    meeting.watch.finish()


def probe(folder: Path, axis: str, num_ranks: int) -> dict[str, Any]:
    """One axis, all ranks of one model."""
    grid = make_grid(Parallelism(tensor=num_ranks, axis=axis), num_ranks, "mpirun")
    start_axonn(grid, CPU)
    whole, model = adapted(folder), adapted(folder)
    shards = shard(model, grid)
    layers = {path: it for path, it in model.named_modules() if is_sharded(it)}
    weights = dict(whole.named_parameters())
    gathered = max(
        float((gather_weight(layer) - weights[f"{path}.weight"]).abs().max())
        for path, layer in layers.items()
    )
    # Rows of other lengths on each rank, and a batch of another size.
    ranks = AxonnRanks(CPU)
    batches = [rows(rank) for rank in range(num_ranks)]
    logits = model(input_ids=batches[ranks.rank]).logits
    expected = whole(input_ids=batches[ranks.rank]).logits
    logits.square().sum().backward()
    learnt = [it for _, it in trainable_parameters(model)]
    ranks.sum_gradients(learnt)
    norm = ranks.clip_gradients(learnt, MAX_NORM)
    for batch in batches:
        whole(input_ids=batch).logits.square().sum().backward()
    reference = [it for _, it in trainable_parameters(whole)]
    whole_norm = torch.nn.utils.clip_grad_norm_(reference, MAX_NORM)
    gradients = max(
        float((mine.grad - theirs.grad).abs().max())
        for mine, theirs in zip(learnt, reference, strict=True)
    )
    return {
        "layers": len(layers),
        "held": shards.held_weights,
        "total": shards.total_weights,
        "whole": list(shards.whole),
        "gathered": gathered,
        "logits": float((logits - expected).abs().max()),
        "gradients": gradients,
        "norms": [float(norm), float(whole_norm)],
    }


def adapted(folder: Path) -> Any:
    """The model with adapters that change something."""
    base = load_base(Checkpoint(str(folder)), Placement(CPU, torch.float32))
    model = adapt(base, LoraSettings(r=4, alpha=8, dropout=0.0), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def rows(rank: int) -> torch.Tensor:
    """(rows, tokens) of one rank."""
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 300, (2 + rank, 7 - rank), generator=draw)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
