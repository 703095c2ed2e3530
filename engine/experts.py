"""Mixtures of experts with packed weights.

transformers stacks the experts of a layer in parameters with three axes, and says in a few
attributes what is done with them (`transformers.integrations.moe`): whether there is a gate, a
bias, a norm, and which way the matrices lie. That is all that is known here, no architecture.
Each expert is packed by itself while it is read, and a step reads those experts alone to which
its tokens are routed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.activations import kind_of
from engine.kernels import pointwise
from engine.kernels.packed import STRIP_ROWS, PackedMatrix
from engine.packed_linear import Packed

_DOWN: Final = "down_proj"
# What transformers' own functions for experts ask of such a module.
_ASKED: Final = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")
# act(gate) * up, with gate and up side by side; whoever needs another writes its own.
_USUAL_GATE: Final = "_default_apply_gate"


class PackedExperts(Packed):
    """All experts of one layer, in the place of the model's own module.

    The experts of one parameter lie one behind the other in a single matrix, each beginning at a
    strip of rows.
    """

    def __init__(
        self, told: nn.Module, matrix_format: str, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            told: the model's module, on the meta device; keeps its small parts (activation, norm,
                biases), and loses the weights.
        """
        super().__init__()
        self.format = matrix_format
        self._told = [told]  # in a list, since a module's attribute would be a child
        self._first = "gate_up_proj" if told.has_gate else "up_proj"
        self.packed_leaves = (self._first, _DOWN)
        self._stacks: dict[str, PackedMatrix] = {}
        self._experts: dict[str, list[PackedMatrix]] = {}
        self._came: dict[str, int] = {}
        for leaf in self.packed_leaves:
            weight: Any = getattr(told, leaf)
            count, rows, cols = weight.shape
            if told.is_transposed:
                rows, cols = cols, rows
            self._allocate(leaf, count, rows, cols, device)
            del told._parameters[leaf]
        self.num_experts = len(self._experts[_DOWN])
        self._move_small_parts(told)
        gate: Any = getattr(type(told), "_apply_gate", None)
        is_usual = getattr(gate, "__qualname__", None) == _USUAL_GATE
        self._gate_kind = kind_of(getattr(told, "act_fn", None)) if is_usual else None
        self.train(told.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            told = self.__dict__.get("_told")
            if told and not name.startswith("__"):
                return getattr(told[0], name)
            raise

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Run each token through its experts.

        Args:
            hidden: (tokens, hidden_size).
            experts: (tokens, k) int64, the experts of each token.
            weights: (tokens, k), how much each counts.
        Returns:
            (tokens, hidden_size).
        """
        told: Any = self._told[0]
        tokens, k = experts.shape
        pairs = experts.reshape(-1)
        order = torch.argsort(pairs, stable=True)
        counts = torch.bincount(pairs, minlength=self.num_experts).tolist()[: self.num_experts]
        mixed = self._multiply(self._first, counts, hidden[order // k])
        if not told.has_gate:
            mixed = told.act_fn(mixed)
        elif self._gate_kind is not None:
            mixed = pointwise.gated(self._gate_kind, mixed)
        else:
            mixed = told._apply_gate(mixed)
        by_expert = self._multiply(_DOWN, counts, mixed)
        if told.has_post_expert_norm:
            by_expert = told.post_expert_norm(by_expert)
        out = torch.empty_like(by_expert)
        out[order] = by_expert
        weighted = out.view(tokens, k, -1) * weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden.dtype)

    def part_length(self, leaf: str) -> int:
        """One expert."""
        return 1

    def take(self, leaf: str, start: int, part: Tensor) -> None:
        """Pack some experts."""
        for number, weight in enumerate(part):
            rows = weight.t() if self._told[0].is_transposed else weight
            self._experts[leaf][start + number].fill(rows)
        self._came[leaf] += len(part)

    def lacks(self, leaf: str) -> bool:
        """Whether experts are missing."""
        return self._came[leaf] < self.num_experts

    def matrices(self) -> list[PackedMatrix]:
        """One for each stacked parameter; one for each expert where they were converted."""
        if not self._stacks:
            return [it for leaf in self.packed_leaves for it in self._experts[leaf]]
        return [self._stacks[leaf] for leaf in self.packed_leaves]

    def release(self) -> None:
        """Let go of the weights; nothing can be computed any more."""
        super().release()
        for leaf in self.packed_leaves:
            for it in self._experts[leaf]:
                it.release()

    def convert(self, convert: Callable[[PackedMatrix], PackedMatrix | None]) -> None:
        """Put what `convert` makes of each expert in its place, unless it gives None for some."""
        converted = {}
        for leaf in self.packed_leaves:
            found = [convert(it) for it in self._experts[leaf]]
            if any(it is None for it in found):
                return
            converted[leaf] = [it for it in found if it is not None]
        self._experts, self._stacks = converted, {}

    def all_came(self) -> None:
        """Note that the matrices are filled."""
        self._came = dict.fromkeys(self.packed_leaves, self.num_experts)

    def expert(self, leaf: str, number: int) -> PackedMatrix:
        """(out, in) of one expert."""
        return self._experts[leaf][number]

    def extra_repr(self) -> str:
        """What printing a model shows."""
        return f"num_experts={self.num_experts}, format={self.format}"

    def _allocate(
        self, leaf: str, count: int, rows: int, cols: int, device: torch.device | str
    ) -> None:
        each = -(-rows // STRIP_ROWS) * STRIP_ROWS
        stack = PackedMatrix.allocate(self.format, (count - 1) * each + rows, cols, device)
        self._stacks[leaf] = stack
        self._experts[leaf] = [stack.part(it * each, it * each + rows) for it in range(count)]
        self._came[leaf] = 0

    def _move_small_parts(self, told: nn.Module) -> None:
        """Own the biases and norms, so that they are found, and loaded, by their names."""
        self._parameters, self._buffers = told._parameters, told._buffers
        self._modules = told._modules

    def _multiply(self, leaf: str, counts: list[int], given: Tensor) -> Tensor:
        """Rows in the order of the experts, each by its expert's matrix."""
        matrices = self._experts[leaf]
        biases = getattr(self._told[0], f"{leaf}_bias") if self._told[0].has_bias else None
        out = given.new_empty(len(given), matrices[0].rows)
        called = [it for it, count in enumerate(counts) if count]
        sizes = [counts[it] for it in called]
        parts = torch.split(given, sizes), torch.split(out, sizes)
        for it, rows, result in zip(called, *parts, strict=True):
            bias = None if biases is None else biases[it]
            matrices[it].matmul(rows, bias=bias, out=result)
        return out


def can_pack(module: nn.Module) -> bool:
    """Whether a module is one of stacked experts that transformers' own functions could run."""
    if not all(hasattr(module, it) for it in _ASKED):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    stacked: list[Any] = [module._parameters.get(leaf) for leaf in (first, _DOWN)]
    if any(it is None or it.ndim != 3 for it in stacked):
        return False
    other = [it for leaf, it in module.named_parameters(recurse=False) if it.ndim > 2]
    return len(other) == 2 and stacked[0].shape[0] == stacked[1].shape[0]
