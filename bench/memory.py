"""Peak memory of loading one section, against what it holds.

    python bench/memory.py [--model DIR] [--sections 2] [--index 0] [--json]

Without --model a random Llama of about 1 GB in bfloat16 is made in a temporary folder. The load
runs in a process of its own; its resident memory is read after the imports and at its peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

MIB = 2**20

_LOAD = r"""
import json, re, sys
import psutil
import engine.stage_loading
from engine.architecture import read_architecture
from engine.checkpoint import Checkpoint
model, sections, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
read_architecture(Checkpoint(model)).model_class  # imports the model's own code
imported = psutil.Process().memory_info().rss
stage = engine.stage_loading.load_stage(model, sections=sections, index=index)
# ru_maxrss would hold the parent's peak too, since it survives exec.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
largest = max(p.numel() * p.dtype.itemsize for p in stage._model.parameters())
print(json.dumps({"imported": imported, "peak": peak, "largest_parameter": largest,
                  "stage": stage.stage_bytes, "read": stage.read_bytes,
                  "layers": [stage.start_layer, stage.end_layer]}))
"""


@click.command()
@click.option("--model", type=click.Path(exists=True), help="A checkpoint folder.")
@click.option("--sections", default=2, show_default=True)
@click.option("--index", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(model: str | None, sections: int, index: int, as_json: bool) -> None:
    """Load one section and compare its peak memory with what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            make_random_llama(Path(folder))
        figures = measure(model or folder, sections, index)
    if as_json:
        click.echo(json.dumps(figures))
        return
    table = Table("what", "MiB")
    for name in ("read", "stage", "largest_parameter", "imported", "peak", "overhead"):
        table.add_row(name.replace("_", " "), f"{figures[name] / MIB:.0f}")
    Console().print(table)
    click.echo("overhead = peak - imported - stage; one parameter is what loading may add")


def measure(model: str, sections: int, index: int) -> dict[str, Any]:
    """Figures in bytes of loading one section in a fresh process."""
    command = [sys.executable, "-c", _LOAD, model, str(sections), str(index)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    figures["overhead"] = figures["peak"] - figures["imported"] - figures["stage"]
    return figures


def make_random_llama(folder: Path) -> None:
    """Save a random Llama of about 1 GB, in shards of 200 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="200MB")


if __name__ == "__main__":
    main()
