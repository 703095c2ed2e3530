"""trl's SFTTrainer over rows that are tokens already, in the order that every way of training uses.

Batches, learning rate, random numbers and optimizer are those of `engine.jobs.training_loop`, so
that LoRA and SFT learn the same from the same data, and a run can go on at any step. The forward
pass, its loss, mixed precision and the gradients of several processes are trl's and accelerate's.
Knows no files of a run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from engine.jobs.base_model import Placement
from engine.jobs.batches import BatchPlan, MicroBatch, collate
from engine.jobs.memory_words import memory_in_words
from engine.jobs.ranks import Ranks
from engine.jobs.seeds import mixed
from engine.jobs.sft_job import SftJob
from engine.jobs.token_rows import TokenRows
from proto.errors import ModelError

TRAINER_STATE: Final = "trainer_state.json"
CHECKED_TOKENS: Final = 64


class RowsTrainer(SFTTrainer):
    """One run of trl's trainer. Whoever follows it is a callback."""

    def __init__(
        self,
        *,
        model: Any,
        job: SftJob,
        plan: BatchPlan,
        rows: TokenRows,
        tokenizer: Any,
        placement: Placement,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        callback: TrainerCallback,
        scratch: Path,
    ) -> None:
        """Prepare, without a step.

        Args:
            model: a PeftModel on its device.
            optimizer: over the weights that learn, with its moments if the run goes on.
            callback: hears of every step, and sets the optimizer's learning rate before it.
            scratch: a folder that may be made for what trl's trainer insists to keep on disk.
        """
        training = job.settings.training
        self._settings, self._plan, self._rows = training, plan, rows
        self._placement, self._ranks = placement, ranks
        self._micro_batch = 0
        self._scratch = scratch
        super().__init__(
            model=model,
            args=_config(job, plan, str(scratch)),
            # Rows are looked up by their number: nothing is copied, tokenized or shifted again.
            train_dataset=Dataset.from_dict({"row": range(len(rows))}),
            data_collator=lambda batch: _tensors(rows, batch),
            processing_class=tokenizer,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[callback],
        )
        # trl's loss is divided by the learnt tokens of all processes, whatever the model's class
        # itself takes.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def go_on(self, first_step: int) -> None:
        """Train from a step to the end, or until a callback stops it."""
        if first_step == 0:
            self.train()
            return
        state: Any = TrainerState(global_step=first_step)  # without annotations
        state.compute_steps(self.args, self._plan.total_steps)
        state.train_batch_size = self._train_batch_size
        self._scratch.mkdir(parents=True, exist_ok=True)
        state.save_to_json(str(self._scratch / TRAINER_STATE))
        self.train(resume_from_checkpoint=str(self._scratch))

    def close(self) -> None:
        """Remove what the trainer kept on disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's share of each step, however many processes there are."""
        shares = _Shares(
            self._plan,
            self._ranks,
            self._settings.accumulation,
            lambda: self.state.global_step // self._plan.steps_per_epoch,
        )
        numbers: Any = _Numbers(len(self._rows))
        return DataLoader(
            numbers,
            batch_sampler=shares,
            collate_fn=self.data_collator,
            pin_memory=self._placement.device.type == "cuda",
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One micro-batch; its random numbers follow from the seed, the step and its place."""
        step = self.state.global_step
        parts = (self._settings.seed, step, self._micro_batch, self._ranks.rank)
        torch.manual_seed(mixed(*parts))
        batches = self._plan.share(step, self._ranks.rank, self._ranks.num_processes)
        batch = batches[self._micro_batch]
        self._micro_batch = (self._micro_batch + 1) % len(batches)
        with memory_in_words(self._settings, self._rows, batch, self._placement):
            trl: Any = super()  # without annotations
            return trl.training_step(model, inputs, num_items_in_batch)

    def loss_sum(self, rows: TokenRows, batch: MicroBatch) -> float:
        """Of all learnt tokens of rows that are only looked at, in nats."""
        tensors = {
            name: it.to(self._placement.device) for name, it in _tensors(rows, batch).items()
        }
        with (
            memory_in_words(self._settings, rows, batch, self._placement),
            torch.no_grad(),
            self.compute_loss_context_manager(),
        ):
            trl: Any = self  # without annotations
            loss = trl.compute_loss(self.model, tensors, num_items_in_batch=torch.tensor(1))
        self._metrics["eval"].clear()  # trl's own averages, which nobody asks for
        return float(loss) / self._ranks.num_processes

    def check_loss(self, model_name: str) -> None:
        """Make sure that trl's loss is the model's.

        trl multiplies with the output layer itself, and has to know what else a model does there.

        Raises:
            ModelError: the two differ; nothing was learnt yet.
        """
        row = self._rows[0]
        ids = torch.from_numpy(row.input_ids[:CHECKED_TOKENS])[None].to(self._placement.device)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        trl: Any = self  # without annotations
        model: Any = self.model
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**tensors, use_cache=False).logits[0, :-1].float()
            expected = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            labelled = {**tensors, "labels": ids}
            found = trl.compute_loss(model, labelled, num_items_in_batch=torch.tensor(1))
        self._metrics["eval"].clear()
        found = found / self._ranks.num_processes
        model.train()
        is_exact = self._placement.dtype is torch.float32 and not (self.args.bf16 or self.args.fp16)
        tolerance = 1e-3 if is_exact else 5e-2
        if not torch.isclose(found, expected, rtol=tolerance, atol=tolerance):
            raise ModelError(
                f"trl computes another loss of {model_name} than the model itself "
                f"({float(found):.4f} and {float(expected):.4f} over {ids.shape[1] - 1} tokens): "
                "take `manager finetune lora`, which asks the model."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are in place: checkpoints are `engine.jobs.checkpoints`'s business."""


def _config(job: SftJob, plan: BatchPlan, scratch: str) -> SFTConfig:
    training = job.settings.training
    return SFTConfig(
        output_dir=scratch,
        max_steps=plan.total_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        use_cpu=job.on_cpu,
        bf16=job.mixed_precision == "bf16",
        fp16=job.mixed_precision == "fp16",
        # Set on the model where it is wanted, as for LoRA.
        activation_checkpointing=False,
        average_tokens_across_devices=True,
        loss_type="nll",
        router_aux_loss_coef=0.0,
        # Every step is told, and a loss that is no number is not hidden.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=int(job.timeout_s),
    )


def _tensors(rows: TokenRows, batch: Sequence[int | None]) -> dict[str, Any]:
    """trl counts tokens by the mask, and wants one even where nothing is padded."""
    tensors = collate(rows, batch)
    if "position_ids" not in tensors and "attention_mask" not in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return tensors


class _Numbers:
    """A data set whose rows are their own numbers; None is nothing."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | None) -> int | None:
        return index


class _Shares(Sampler[list[int]]):
    """The micro-batches of one process in the epoch that the trainer is in."""

    def __init__(
        self, plan: BatchPlan, ranks: Ranks, accumulation: int, epoch: Callable[[], int]
    ) -> None:
        self._plan, self._ranks, self._epoch = plan, ranks, epoch
        last = len(self._of(plan.steps_per_epoch - 1))
        self._count = (plan.steps_per_epoch - 1) * accumulation + last
        assert math.ceil(self._count / accumulation) == plan.steps_per_epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Any]]:
        first = self._epoch() * self._plan.steps_per_epoch
        for step in range(first, first + self._plan.steps_per_epoch):
            yield from (list(batch) for batch in self._of(step))

    def _of(self, step: int) -> list[MicroBatch]:
        return self._plan.share(step, self._ranks.rank, self._ranks.num_processes)
