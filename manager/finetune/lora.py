"""`manager finetune lora`: LoRA in one process of this machine."""

from __future__ import annotations

import click

from engine.jobs.settings import JobSettings
from manager.finetune.extras import require
from manager.finetune.options import job_options


@click.command()
@job_options("lora")
@click.option("--json", "as_json", is_flag=True, help="Print paths and figures as JSON.")
def lora(settings: JobSettings, as_json: bool) -> None:
    """Fine-tune a model by LoRA, on the CPU or on one GPU.

    SAVE_DIR gets lora_adapters, merged_model, checkpoints, metrics.jsonl, TensorBoard's files, a
    picture of the losses and report.md. A run that was ended goes on with --resume.
    """
    require("peft", "manager finetune lora")
    from engine.jobs.run_folder import check_run_folder

    check_run_folder(settings.output)
    from engine.jobs.lora import run_lora
    from manager.finetune.running import run_job

    run_job(run_lora, settings, as_json=as_json)
