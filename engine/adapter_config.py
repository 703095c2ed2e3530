"""What an adapter's adapter_config.json says of how its matrices are to be applied.

peft's own names and rules: rank and alpha by patterns of module paths, rank-stabilised scaling,
DoRA. Whatever would change the result and is not applied here is refused by its name, also a
setting of a later release that nobody here has heard of. Reads no file, imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NoReturn

import regex

from proto.errors import AdapterError

CONFIG_FILE: Final = "adapter_config.json"
LORA: Final = "LORA"
TASK: Final = "CAUSAL_LM"

# What says how or on what an adapter was trained; its matrices are what came of it.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",  # a tied embedding would be among the tensors
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # which way round a weight lies is seen from the module
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    }
)
_APPLIED: Final = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# Ways of starting that leave the base model's weights alone. The others change them: their
# matrices belong to another base than the checkpoint's.
_PLAIN_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica")
MERGE: Final = "`manager finetune merge` makes an ordinary checkpoint of it, which can be served"
_MERGE_ELSEWHERE: Final = "merge it into its base model with peft, and serve that"
# Why those that people meet are refused, and what can be done about it.
_REASONS: Final = {
    "modules_to_save": f"trained whole modules beside its matrices; {MERGE}",
    "trainable_token_indices": f"trained embeddings, which the manager holds; {MERGE}",
    "target_parameters": f"adapts parameters of no linear module (stacked experts); {MERGE}",
    "layer_replication": "runs some layers more than once",
    "alora_invocation_tokens": "applies only behind certain tokens",
    "use_qalora": "is made for one quantized base model",
}

# Bounds on what a file may make this program do; far beyond any adapter that trains.
MAX_RANK: Final = 65_536
MAX_PATTERNS: Final = 4096
MAX_PATTERN_CHARS: Final = 512
MAX_NUMBER: Final = 1e30
# On one path of a module, of at most some hundred characters. An expression can try for ever.
PATIENCE_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """How the matrices of one adapter are applied."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilised: bool
    is_dora: bool
    has_bias: bool  # the second matrices have one

    def rank_of(self, path: str) -> int:
        """The rank at a module, by its path in the model that was trained."""
        rank: int = _by_pattern(self.rank_pattern, path, self.rank)
        return rank

    def scaling_of(self, path: str) -> float:
        """What the product of the two matrices is multiplied with.

        Rank-stabilised LoRA: arXiv:2312.03732.
        """
        alpha: float = _by_pattern(self.alpha_pattern, path, self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def parse_config(said: Mapping[str, Any], where: str) -> AdapterConfig:
    """Read a parsed adapter_config.json.

    Args:
        where: the file, for sentences.
    Raises:
        AdapterError: it is of another kind than LoRA, has a bad value, or asks for something that
            is not applied here; names the key and the value.
    """
    config = _Reader(said, where)
    config.check_kind()
    config.check_settings()
    result = AdapterConfig(
        rank=config.rank("r", said.get("r")),
        alpha=config.number("lora_alpha", said.get("lora_alpha")),
        rank_pattern=config.patterns("rank_pattern", config.rank),
        alpha_pattern=config.patterns("alpha_pattern", config.number),
        is_rank_stabilised=bool(said.get("use_rslora")),
        is_dora=bool(said.get("use_dora")),
        has_bias=bool(said.get("lora_bias")),
    )
    if result.is_dora and result.has_bias:
        config.refuse("use_dora and lora_bias are both set, which cannot be applied together")
    return result


class _Reader:
    """One file's values, and sentences about them."""

    def __init__(self, said: Mapping[str, Any], where: str) -> None:
        self._said, self._where = said, where

    def check_kind(self) -> None:
        kind = self._said.get("peft_type")
        if kind != LORA:
            self.refuse(
                f"peft_type is {_shown(kind)}: only {LORA} adapters can be served; "
                f"{_MERGE_ELSEWHERE}"
            )
        task = self._said.get("task_type")
        if task not in (None, TASK):
            self.refuse(
                f"task_type is {_shown(task)}: only adapters that generate text ({TASK}) can be "
                "served"
            )

    def check_settings(self) -> None:
        """Everything else that would change the result."""
        start = self._said.get("init_lora_weights", True)
        if not isinstance(start, bool) and start is not None and start not in _PLAIN_STARTS:
            self.refuse(
                f"init_lora_weights is {_shown(start)}, which changes the base model's own "
                "weights: convert it with peft's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        if self._said.get("bias", "none") != "none":
            self.refuse(
                f"bias is {_shown(self._said['bias'])}: it trained the base model's biases as "
                f"well, which is not applied here; {MERGE}"
            )
        for key, value in self._said.items():
            if value and key not in _WITHOUT_EFFECT and key not in _APPLIED:
                reason = _REASONS.get(key, "asks for something that is not applied here")
                self.refuse(f"{key} is {_shown(value)}: this adapter {reason}")

    def rank(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            self.refuse(f"{key} is {_shown(value)}; it takes a whole number from 1 to {MAX_RANK}")
        return value

    def number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{key} is {_shown(value)}; it takes a number")
        if not abs(value) <= MAX_NUMBER:  # nor NaN, nor a whole number that no float holds
            self.refuse(f"{key} is {_shown(value)}; it takes a finite number")
        return float(value)

    def patterns(self, key: str, read: Any) -> dict[str, Any]:
        """A mapping of patterns of module paths, in the order in which they are tried."""
        patterns = self._said.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
            self.refuse(
                f"{key} is {_shown(patterns)}; it takes at most {MAX_PATTERNS} patterns of module "
                "paths, with a number each"
            )
        for pattern in patterns:
            if len(pattern) > MAX_PATTERN_CHARS:
                self.refuse(f"{key} has a pattern of more than {MAX_PATTERN_CHARS} characters")
            try:
                re.compile(_within(pattern))  # what peft would compile
                _end_of_path(pattern)
            except (re.error, regex.error, RecursionError, OverflowError) as exc:
                self.refuse(f"{key} has the pattern {pattern!r}, which is none ({exc})")
        return {pattern: read(f"{key}[{pattern!r}]", it) for pattern, it in patterns.items()}

    def refuse(self, what: str) -> NoReturn:
        raise AdapterError(f"{self._where}: {what}.")


def _by_pattern(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of a path; peft's own rule."""
    for pattern, value in patterns.items():
        try:
            if _end_of_path(pattern).match(path, timeout=PATIENCE_S):
                return value
        except TimeoutError as exc:
            raise AdapterError(
                f"{CONFIG_FILE} has the pattern {pattern!r}, which takes for ever to compare with "
                f"{path}: write it more simply."
            ) from exc
    return otherwise


@lru_cache(MAX_PATTERNS)
def _end_of_path(pattern: str) -> regex.Pattern[str]:
    # Not Python's own: this one can be told to give up, and lets other threads run meanwhile.
    return regex.compile(_within(pattern))


def _within(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
