"""`manager submit`: the same work as here, as a Slurm job. One file a backend, one line each."""

from __future__ import annotations

from manager.cli import LazyGroup

BACKENDS = {
    "pipeline": (
        "manager.slurm.submit_pipeline",
        "pipeline",
        "The pipeline over several nodes: a batch of prompts, or one.",
    ),
    "llama-server": (
        "manager.slurm.submit_llama_server",
        "llama_server",
        "llama.cpp's llama-server, with an rpc-server on each node but the first.",
    ),
    "lora": ("manager.slurm.submit_finetune", "lora", "Fine-tuning by LoRA on one GPU, or none."),
    "sft": ("manager.slurm.submit_finetune", "sft", "SFT with trl, on all GPUs of several nodes."),
    "axonn": (
        "manager.slurm.submit_finetune",
        "axonn",
        "Fine-tuning with AxoNN: tensor x data parallel over several nodes.",
    ),
}

submit = LazyGroup(
    name="submit",
    commands=BACKENDS,
    help="Run it on a Slurm cluster, as a job; `manager jobs` shows what becomes of it.",
)
