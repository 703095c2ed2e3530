"""`manager finetune`: the ways of fine-tuning, and what goes with them.

Imports nothing but click until one of them is chosen.
"""

from __future__ import annotations

from typing import Final

from manager.cli import LazyGroup

COMMANDS: Final[dict[str, tuple[str, str, str]]] = {
    "lora": ("manager.finetune.lora", "lora", "LoRA: the CPU, one GPU, or one process on each."),
    "sft": ("manager.finetune.sft", "sft", "SFT with trl: all GPUs of a node, or of many nodes."),
    "axonn": ("manager.finetune.axonn", "axonn", "AxoNN: tensor x data parallel, a rank a GPU."),
    "data": ("manager.finetune.data", "data", "Show what would be learnt from some data."),
    "merge": ("manager.finetune.merge", "merge", "Add an adapter to its base model."),
}

finetune = LazyGroup(
    name="finetune",
    commands=COMMANDS,
    help="Fine-tune a model on your own data; what comes out is served by the pipeline.",
)
