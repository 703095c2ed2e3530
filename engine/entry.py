"""What comes before the first layer: tokenizer, embeddings, and what else the model does there.

The manager holds one of these. No decoder layer is ever loaded: the checkpoint's own class runs
up to its first layer and stops. The embedding matrix is mapped, not read: the operating system
brings in the rows that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine import attention
from engine.architecture import (
    DTYPES,
    Architecture,
    find_layers,
    read_architecture,
)
from engine.checkpoint import Checkpoint
from engine.foreign_code import first_line, foreign
from engine.outline import before_and_after, put_slots, run_to_first_layer, stub_unloaded
from engine.rotary import by_length
from engine.slots import Conductor
from engine.stage_loading import choose_dtype
from engine.tokenizer_file import check_rules, check_tokenizer_file
from engine.weights import WeightPlan, fill_buffers
from proto.errors import Error, ModelError, ModelUnfit


class Entry:
    """The part of one checkpoint that the manager keeps."""

    def __init__(self, model: str | None, dtype: str) -> None:
        """Open a checkpoint and map its embeddings; see `load_entry`."""
        self.checkpoint = checkpoint = Checkpoint(model)
        architecture = read_architecture(checkpoint)
        self.model_name, self.fingerprint = checkpoint.name, checkpoint.fingerprint
        self.architecture = architecture.name
        self.num_layers = architecture.num_layers
        self.hidden_size = architecture.hidden_size
        self.vocab_size = architecture.vocab_size
        self.max_context = architecture.max_context
        self.rope_switch = architecture.rope_switch
        self._dynamic_rope_from = architecture.dynamic_rope_from
        self.dtype = choose_dtype(dtype, architecture)
        self.dtype_name = next(name for name, it in DTYPES.items() if it == self.dtype)
        attention.register()
        self._model = architecture.build(self.dtype, attention.ATTENTION_NAME)
        self._conductor = Conductor(0, 0, architecture.num_layers)
        try:
            self._load(architecture)
        except (Error, MemoryError):
            raise
        except Exception as exc:  # whatever foreign model code raises when it is run in part
            raise ModelUnfit(
                f"{architecture.name} cannot be split: what comes before its first layer "
                f"does not run alone ({first_line(exc)})"
            ) from exc
        self._plain = self._find_plain_embedding()
        self.tokenizer = _load_tokenizer(checkpoint)
        self.eos_token_ids = self._eos()

    def embed(self, token_ids: Sequence[int] | Tensor, positions: Sequence[int] | Tensor) -> Tensor:
        """What the first layer gets for these tokens.

        Args:
            token_ids: (tokens,), each below `vocab_size`.
            positions: (tokens,), each token's place within its own sequence.
        Returns:
            (tokens, hidden_size) in `dtype`, on the CPU.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        with torch.inference_mode():
            if self._plain is not None:
                hidden: Tensor = self._plain(ids.unsqueeze(0))[0]
                return hidden
            return self._run(ids, torch.as_tensor(positions, dtype=torch.int64))

    def prompt_salt(self, prompt_tokens: int) -> int:
        """What tells prompts apart whose equal beginnings still give different keys.

        With dynamic NTK rotary tables the keys of a prompt beyond the original context depend on
        its whole length; for all other models this is 0, and equal beginnings may be shared.
        """
        limit = self._dynamic_rope_from
        return prompt_tokens if limit is not None and prompt_tokens > limit else 0

    def _load(self, architecture: Architecture) -> None:
        """Map the weights of what runs before the first layer, and nothing else."""
        model = self._model
        path, layers = find_layers(model, architecture)
        plan = WeightPlan(model, architecture, self.checkpoint, mapped=True)
        before, _ = before_and_after(model, path, layers, architecture.name)
        put_slots(model, path, layers, self._conductor)

        def wanted(name: str) -> bool:
            return name.rpartition(".")[0] in before

        plan.check(wanted)
        plan.load(wanted, torch.device("cpu"), None)
        stub_unloaded(model)
        fill_buffers(model, torch.device("cpu"))
        by_length(model)
        self._check()

    def _check(self) -> None:
        """Refuse embeddings that are no numbers, or that depend on how steps are cut."""
        probe = torch.arange(min(8, self.vocab_size))
        whole = self._run(probe, torch.arange(len(probe)))
        if bool(whole.isnan().any()):
            raise ModelError(
                f"the embeddings of {self.model_name} hold NaN: "
                "the checkpoint is damaged, fetch it again"
            )
        backwards = self._run(probe.flip(0), torch.arange(len(probe)).flip(0)).flip(0)
        for other in (backwards, self._run(probe, None)):
            if float((other - whole).float().norm()) > 0.01 * float(whole.float().norm()):
                raise ModelUnfit(
                    f"{self.architecture} cannot be split: what comes before its first layer "
                    "counts positions in a way of its own"
                )

    def _run(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        return run_to_first_layer(self._model, self._conductor, ids, positions)

    def _find_plain_embedding(self) -> nn.Module | None:
        """The embedding module, if it alone gives what layer 0 gets: then it is called directly."""
        module = self._model.get_input_embeddings()
        ids = torch.arange(min(8, self.vocab_size))
        with torch.inference_mode():
            positions = torch.arange(len(ids)).flip(0) * 3
            same = torch.equal(module(ids.unsqueeze(0))[0], self._run(ids, positions))
        return module if same else None

    def _eos(self) -> frozenset[int]:
        """Every token that ends a text: by generation_config.json, config.json, tokenizer."""
        said: set[int] = set()
        generation = self.checkpoint.optional_json("generation_config.json") or {}
        for value in (generation.get("eos_token_id"), self._model.config.eos_token_id):
            said.update(
                it for it in (value if isinstance(value, list) else [value]) if type(it) is int
            )
            if said:
                break
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            said.add(self.tokenizer.eos_token_id)
        return frozenset(said)


def load_entry(model: str | None, *, dtype: str = "auto") -> Entry:
    """Open what the manager needs of a checkpoint.

    Args:
        model: a folder, a hub id, or None for the demo model.
        dtype: as the workers say it ("float32", ...), or "auto".
    Raises:
        ModelError: no checkpoint there, or one that cannot be split.
    """
    return Entry(model, dtype)


def _load_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer; None where the checkpoint has none, which still runs on token ids."""
    from transformers import AutoTokenizer

    folder = checkpoint.tokenizer_folder()
    if folder is None:
        return None
    if (folder / "tokenizer.json").is_file():
        check_tokenizer_file(folder / "tokenizer.json")
    with foreign(f"the tokenizer of {checkpoint.name} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_rules(tokenizer, checkpoint.name)
    with foreign(f"the tokenizer of {checkpoint.name} does not work"):
        tokenizer.decode(tokenizer("a text 1")["input_ids"])
        if not isinstance(tokenizer.eos_token_id, (int, type(None))):
            raise TypeError(f"eos_token_id {tokenizer.eos_token_id!r}")
    return tokenizer
