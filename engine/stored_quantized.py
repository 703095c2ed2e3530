"""A checkpoint's tensors as plain numbers, also where it stores them quantized.

Quantized checkpoints keep several tensors in a weight's place: packed integers, scales, zero
points. Here each such group is one tensor under the weight's own name, worked out in parts as it
is read; everything behind this file sees an ordinary checkpoint. Which layouts there are is said
by config.json's `quantization_config`; those that are not known are refused by name. Knows nothing
of models: which weight is whose is `engine.weights`'.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.json_file import shown
from engine.safetensors_file import Progress
from proto.errors import ModelError

_PART_BYTES: Final = 64 * 2**20  # of float32 numbers that are worked out at a time
_FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_INDICES: Final = (torch.int32, torch.int64)
# Values of a 4-bit float with 2 bits of exponent and 1 of mantissa (OCP Microscaling Formats 1.0).
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_COMPRESSED_FORMATS: Final = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
)
# AWQ packs 8 columns of a row into 32 bits in this order (github.com/casper-hansen/AutoAWQ).
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = Mapping[str, Tensor]  # the stored tensors that make one, by what they are


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Stored tensors that make one."""

    shape: tuple[int, ...]
    parts: dict[str, str]  # what it is -> its key
    # Those whose first axis is the made one's: some entries of it are enough.
    by_entry: frozenset[str] = frozenset()
    # Makes entries [start, stop) of the first axis, float32; of `by_entry` it gets only these.
    make: Callable[[Parts, int, int], Tensor]


class StoredTensors:
    """What a checkpoint holds, under the names that its weights would have unquantized."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Find the groups; reads headers, no tensor.

        Raises:
            ModelError: the layout is not known, or does not hold together.
        """
        self._checkpoint = checkpoint
        config = quantization_of(checkpoint)
        self._groups: dict[str, _Group] = {}
        self.method = ""  # what the numbers depend on beside the tensors
        if config is not None:
            self.method = json.dumps(config, sort_keys=True)
            self._groups = _METHODS[config["quant_method"]](_Finder(checkpoint, config))
        hidden = {key for it in self._groups.values() for key in it.parts.values()}
        self._keys = [*self._groups, *(key for key in checkpoint if key not in hidden)]
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._keys)

    def parts(self, key: str) -> list[str]:
        """The stored tensors that one is made of."""
        group = self._groups.get(key)
        return [key] if group is None else list(group.parts.values())

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        group = self._groups.get(key)
        return self._checkpoint.announced(key).shape if group is None else group.shape

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor as it comes: of numbers that are worked out, float32."""
        return torch.float32 if key in self._groups else self._checkpoint.announced(key).dtype

    def read(self, key: str, dtype: torch.dtype | None, progress: Progress | None) -> Tensor:
        """All of a tensor.

        Args:
            dtype: what numbers become; None leaves them as stored, or float32.
        """
        group = self._groups.get(key)
        if group is None:
            tensor = self._checkpoint.read(key, progress)
            is_number = dtype is not None and tensor.is_floating_point()
            return tensor.to(dtype) if is_number else tensor
        whole = torch.empty(group.shape, dtype=dtype or torch.float32)
        each = max(1, whole[0].numel() * 4)
        step = max(16, _PART_BYTES // each // 16 * 16)
        for start in range(0, len(whole), step):
            stop = min(start + step, len(whole))
            whole[start:stop] = self.read_part(key, start, stop, progress)
        return whole

    def read_part(self, key: str, start: int, stop: int, progress: Progress | None) -> Tensor:
        """Entries [start, stop) of a tensor's first axis, as stored or in float32.

        `start` is a multiple of 16, or the tensor has more than two axes. What is returned is good
        until the next part is read.
        """
        group = self._groups.get(key)
        if group is None:
            entry = self._checkpoint.entry(key)
            num_bytes = entry.num_bytes // max(1, entry.shape[0]) * (stop - start)
            buffer = self._buffer_of(num_bytes)
            return self._checkpoint.read_part(key, start, stop, progress, buffer)
        if self._held[0] != key:
            self._held = ("", {})  # before the next are read
            whole = {
                what: self._checkpoint.read(it, progress)
                for what, it in group.parts.items()
                if what not in group.by_entry
            }
            self._held = (key, whole)
        some = {
            what: self._checkpoint.read_part(group.parts[what], start, stop, progress)
            for what in group.by_entry
        }
        made = group.make({**self._held[1], **some}, start, stop)
        if stop >= group.shape[0]:
            self._held = ("", {})
        return made

    def _buffer_of(self, num_bytes: int) -> Tensor:
        """One piece of memory for all parts.

        Were each part's allocated and freed, the C library would keep some hundreds of megabytes.
        """
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # before the next is there
            self._buffer = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        return self._buffer

    def map(self, key: str) -> Tensor:
        """A tensor as a mapping of its file; one that is stored quantized is read."""
        return self.read(key, None, None) if key in self._groups else self._checkpoint.map(key)


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What config.json says of how weights are stored; None where they are plain.

    Raises:
        ModelError: in a way that is not known here; names it.
    """
    config = checkpoint.config_json.get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method", "?") if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(method, str) or method not in _METHODS:
        raise _unknown(checkpoint, _plain(method))
    return config


class _Finder:
    """One checkpoint's tensors, and how to complain of them."""

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
        self.checkpoint, self.config = checkpoint, config

    def ending(self, suffix: str) -> Iterator[tuple[str, str]]:
        """(what stands before the suffix, key) of every tensor with that ending."""
        for key in self.checkpoint:
            if key.endswith(suffix):
                yield key.removesuffix(suffix), key

    def parts(self, base: str, **names: str) -> dict[str, str]:
        """The tensors of a group that are there, by what they are."""
        found = {what: base + name for what, name in names.items()}
        return {what: key for what, key in found.items() if key in self.checkpoint}

    def require_kind(self, key: str, *kinds: torch.dtype) -> None:
        """Refuse the checkpoint unless a tensor is of one of these types; of any float if none."""
        dtype = self.checkpoint.announced(key).dtype
        if not (dtype in kinds if kinds else dtype.is_floating_point):
            raise self.misfit(f"{key} of {dtype}", self.checkpoint.announced(key).shape)

    def group_size(self, asked: object, key: str, in_features: int, num_groups: int) -> int:
        """How many inputs share a scale, of which there are so many."""
        if type(asked) is int and asked > 0 and -(-in_features // asked) == num_groups:
            return asked
        if in_features % num_groups:  # then nobody can tell
            raise self.misfit(key, self.checkpoint.announced(key).shape)
        return in_features // num_groups

    def rows_of_groups(
        self, order: Tensor | None, in_features: int, num_groups: int, size: int
    ) -> Tensor:
        """(in_features,): the group of each input, as listed or one after the other."""
        if order is None:
            return torch.arange(in_features) // size
        groups = order.long()
        lowest, highest = int(groups.min()), int(groups.max())
        if lowest == highest == -1:  # how compressed-tensors says that nothing was reordered
            return torch.arange(in_features) // size
        if lowest < 0 or highest >= num_groups:
            raise ModelError(
                f"{self.checkpoint.name} ({self.config['quant_method']}): inputs of a weight are "
                f"put into groups {lowest} to {highest}, and it has groups 0 to {num_groups - 1}: "
                "fetch the checkpoint again"
            )
        return groups

    def shape(self, key: str, num_axes: int) -> tuple[int, ...]:
        """Of a tensor with so many axes."""
        shape = self.checkpoint.announced(key).shape
        if len(shape) != num_axes or 0 in shape:
            raise self.misfit(key, shape)
        return shape

    def require(self, is_right: bool, key: str) -> None:
        """Refuse the checkpoint unless a tensor is as the others want it."""
        if not is_right:
            raise self.misfit(key, self.checkpoint.announced(key).shape)

    def misfit(self, key: str, shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"{self.checkpoint.name}: tensor {key} of shape {list(shape)} does not fit the others "
            f"of its weight ({self.config['quant_method']}): fetch the checkpoint again"
        )

    def unknown(self, what: str) -> ModelError:
        return _unknown(self.checkpoint, f"{self.config['quant_method']}, {what}")


def _plain(said: object) -> str:
    """A value of the config, as it reads best in a sentence."""
    return said if isinstance(said, str) and said.replace("-", "_").isidentifier() else shown(said)


def _unknown(checkpoint: Checkpoint, method: str) -> ModelError:
    return ModelError(
        f"{checkpoint.name} is stored quantized ({method}), which cannot be loaded: take the "
        "checkpoint it was made from, and quantize here with --quantize"
    )


# --- integers in groups ------------------------------------------------------------------------


def _gptq(finder: _Finder) -> dict[str, _Group]:
    """GPTQ: integers and zero points packed along inputs and outputs, a scale a group of inputs.

    Layout: github.com/AutoGPTQ/AutoGPTQ (v1: zero points are stored less one) and GPTQModel (v2).
    """
    bits = finder.config.get("bits")
    if type(bits) is not int or bits not in (2, 4, 8):
        raise finder.unknown(f"{_plain(bits)} bits")
    layout = finder.config.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise finder.unknown(f"checkpoint_format {_plain(layout)}")
    each, above = 32 // bits, 1 if layout == "gptq" else 0
    groups = {}
    for base, key in finder.ending(".qweight"):
        parts = finder.parts(
            base, qweight=".qweight", zeros=".qzeros", scales=".scales", order=".g_idx"
        )
        packed_rows, out_features = finder.shape(key, 2)
        in_features = packed_rows * each
        size = _check_group(finder, parts, in_features, out_features, each)

        def make(parts: Parts, start: int, stop: int, size: int = size) -> Tensor:
            whole = _unpacked(parts["qweight"][:, start:stop].t(), bits)
            zeros = _unpacked(parts["zeros"][:, start // each : -(-stop // each)], bits)
            scales = parts["scales"][:, start:stop].float()
            zeros = zeros[:, : stop - start] + above
            rows = finder.rows_of_groups(parts.get("order"), whole.shape[1], len(scales), size)
            return (whole - zeros[rows].t()) * scales[rows].t()

        groups[f"{base}.weight"] = _Group(shape=(out_features, in_features), parts=parts, make=make)
    return groups


def _awq(finder: _Finder) -> dict[str, _Group]:
    """AWQ: integers and zero points packed along outputs, a scale a group of inputs."""
    bits, version = finder.config.get("bits", 4), finder.config.get("version", "gemm")
    if type(bits) is not int or bits != 4 or str(version).lower() != "gemm":
        raise finder.unknown(f"version {_plain(version)} with {_plain(bits)} bits")
    groups = {}
    for base, key in finder.ending(".qweight"):
        parts = finder.parts(base, qweight=".qweight", zeros=".qzeros", scales=".scales")
        in_features, packed = finder.shape(key, 2)
        size = _check_group(finder, parts, in_features, packed * 8, 8)

        def make(parts: Parts, start: int, stop: int, size: int = size) -> Tensor:
            columns = slice(start // 8, -(-stop // 8))
            whole = _awq_unpacked(parts["qweight"][:, columns])[:, : stop - start]
            zeros = _awq_unpacked(parts["zeros"][:, columns])[:, : stop - start]
            scales = parts["scales"][:, start:stop].float()
            rows = finder.rows_of_groups(None, len(whole), len(scales), size)
            return ((whole - zeros[rows]) * scales[rows]).t()

        groups[f"{base}.weight"] = _Group(shape=(packed * 8, in_features), parts=parts, make=make)
    return groups


def _check_group(
    finder: _Finder, parts: dict[str, str], in_features: int, out_features: int, each: int
) -> int:
    """See that scales and zero points are there, and as many as they must be; the group's size."""
    for what in ("zeros", "scales"):
        finder.require(what in parts, parts["qweight"])
    count, columns = finder.shape(parts["scales"], 2)
    finder.require(columns == out_features and count <= in_features, parts["scales"])
    zeros = finder.shape(parts["zeros"], 2)
    finder.require(zeros == (count, -(-out_features // each)), parts["zeros"])
    finder.require_kind(parts["scales"])
    for what in ("qweight", "zeros"):
        finder.require_kind(parts[what], torch.int32)
    if "order" in parts:
        finder.require(finder.shape(parts["order"], 1) == (in_features,), parts["order"])
        finder.require_kind(parts["order"], *_INDICES)
    return finder.group_size(finder.config.get("group_size"), parts["scales"], in_features, count)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """(rows, words) of 32 bits to (rows, words * 32 / bits) float32, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    whole: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return whole.flatten(1).float()


def _awq_unpacked(packed: Tensor) -> Tensor:
    in_order = torch.empty(8, dtype=torch.int64)
    in_order[torch.tensor(_AWQ_ORDER)] = torch.arange(8)
    eights = _unpacked(packed, 4).reshape(len(packed), -1, 8)
    return eights[..., in_order].flatten(1)


# --- numbers with scales -----------------------------------------------------------------------


def _fp8(finder: _Finder) -> dict[str, _Group]:
    """Float8 weights with a scale for each block of rows and columns, or for all."""
    block = finder.config.get("weight_block_size")
    groups = {}
    for base, key in finder.ending("_scale_inv"):
        if base in finder.checkpoint:
            groups[base] = _scaled(finder, base, key, None, block, _FLOAT8)
    return groups


def _compressed(finder: _Finder) -> dict[str, _Group]:
    """compressed-tensors: packed integers in groups, or float8 and int8 with scales."""
    config = finder.config
    sparsity = _table(config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise finder.unknown(f"sparsity {_plain(sparsity)}")
    config_groups = _table(config, "config_groups")
    schemes = [_table(it, "weights") for it in config_groups.values() if isinstance(it, dict)]
    for said in (config.get("format"), *(it.get("format") for it in schemes)):
        if said not in (None, *_COMPRESSED_FORMATS):
            raise finder.unknown(f"format {_plain(said)}")
    packed_bits = [it.get("num_bits") for it in schemes]
    group_sizes = [it.get("group_size") for it in schemes]
    group_size = group_sizes[0] if len(group_sizes) == 1 else None
    block = next((it["block_structure"] for it in schemes if it.get("block_structure")), None)
    groups = {}
    for base, key in finder.ending(".weight_scale"):
        if f"{base}.weight_packed" in finder.checkpoint:
            bits = packed_bits[0] if packed_bits else None
            if (
                type(bits) is not int
                or bits not in (4, 8)
                or packed_bits.count(bits) < len(schemes)
            ):
                raise finder.unknown(f"weights of {shown(packed_bits)} bits")
            groups[f"{base}.weight"] = _packed_integers(finder, base, bits, group_size)
        elif f"{base}.weight" in finder.checkpoint:
            zeros = f"{base}.weight_zero_point"
            kinds = (*_FLOAT8, torch.int8)
            groups[f"{base}.weight"] = _scaled(
                finder,
                f"{base}.weight",
                key,
                zeros if zeros in finder.checkpoint else None,
                block,
                kinds,
            )
    return groups


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is nested under a name; nothing where it is of another kind."""
    said = config.get(name)
    return said if isinstance(said, dict) else {}


def _packed_integers(finder: _Finder, base: str, bits: int, group_size: object) -> _Group:
    """Signed integers, packed along a row with half their range added."""
    parts = finder.parts(
        base,
        packed=".weight_packed",
        scales=".weight_scale",
        zeros=".weight_zero_point",
        order=".weight_g_idx",
    )
    each, half = 32 // bits, 2 ** (bits - 1)
    out_features, words = finder.shape(parts["packed"], 2)
    in_features = words * each
    rows, num_groups = finder.shape(parts["scales"], 2)
    finder.require(rows == out_features and num_groups <= in_features, parts["scales"])
    if "zeros" in parts:
        zeros_shape = finder.shape(parts["zeros"], 2)
        finder.require(zeros_shape == (-(-out_features // each), num_groups), parts["zeros"])
        finder.require_kind(parts["zeros"], torch.int32)
    if "order" in parts:
        finder.require(finder.shape(parts["order"], 1) == (in_features,), parts["order"])
        finder.require_kind(parts["order"], *_INDICES)
    finder.require_kind(parts["packed"], torch.int32)
    finder.require_kind(parts["scales"])
    size = finder.group_size(group_size, parts["scales"], in_features, num_groups)

    def make(parts: Parts, start: int, stop: int) -> Tensor:
        whole: Tensor = _unpacked(parts["packed"], bits) - half
        groups = finder.rows_of_groups(parts.get("order"), in_features, num_groups, size)
        if "zeros" in parts:
            packed = parts["zeros"][start // each : -(-stop // each)].t()
            zeros = _unpacked(packed, bits)[:, : stop - start].t() - half
            whole = whole - zeros[:, groups]
        scales: Tensor = parts["scales"].float()[:, groups]
        return whole * scales

    return _Group(
        shape=(out_features, in_features),
        parts=parts,
        by_entry=frozenset({"packed", "scales"}),
        make=make,
    )


def _scaled(
    finder: _Finder,
    key: str,
    scale_key: str,
    zeros_key: str | None,
    block: Any,
    kinds: tuple[torch.dtype, ...],
) -> _Group:
    """Small numbers, each multiplied with the scale of its block, row, or tensor."""
    entry, scale = finder.checkpoint.announced(key), finder.checkpoint.announced(scale_key)
    shape = entry.shape
    finder.require(len(shape) >= 2 and 0 not in shape, key)
    finder.require_kind(key, *kinds)
    finder.require_kind(scale_key)
    sizes = _block_sizes(shape, scale.shape, block)
    if sizes is None:
        raise finder.misfit(scale_key, scale.shape)

    def make(parts: Parts, start: int, stop: int) -> Tensor:
        numbers = parts["numbers"].float()
        if "zeros" in parts:
            numbers = numbers - _spread(parts["zeros"].float(), shape, sizes, start, stop)
        return numbers * _spread(parts["scales"].float(), shape, sizes, start, stop)

    parts = {"numbers": key, "scales": scale_key}
    if zeros_key is not None:
        finder.require(finder.checkpoint.announced(zeros_key).shape == scale.shape, zeros_key)
        finder.require_kind(zeros_key, *kinds)
        parts["zeros"] = zeros_key
    return _Group(shape=shape, parts=parts, by_entry=frozenset({"numbers"}), make=make)


def _block_sizes(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Any
) -> tuple[int, ...] | None:
    """How many entries of each axis share a scale; None where the scales do not fit."""
    if len(scales) < len(shape):  # of a tensor, or of each row
        scales = (*scales, *(1,) * (len(shape) - len(scales)))
    if len(scales) != len(shape):
        return None
    said = block if isinstance(block, list) and len(block) == 2 else (0, 0)
    wanted = (*(0,) * (len(shape) - 2), *said)
    sizes = []
    for size, count, asked in zip(shape, scales, wanted, strict=True):
        if count == 1:
            sizes.append(size)
        elif type(asked) is int and asked > 0 and -(-size // asked) == count:
            sizes.append(asked)
        elif count > 0 and size % count == 0:
            sizes.append(size // count)
        else:
            return None
    return tuple(sizes)


def _spread(
    scales: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """The scale of every number in entries [start, stop)."""
    spread = scales.reshape(*scales.shape, *(1,) * (len(shape) - scales.ndim))
    for axis, size in enumerate(sizes):
        at = torch.arange(start, stop) if axis == 0 else torch.arange(shape[axis])
        spread = spread.index_select(axis, at // size)
    return spread


def _mxfp4(finder: _Finder) -> dict[str, _Group]:
    """Stacked experts in 4-bit floats, two a byte, 32 to an exponent; inputs come first."""
    groups = {}
    for base, key in finder.ending("_blocks"):
        parts = finder.parts(base, blocks="_blocks", scales="_scales")
        count, rows, num_groups, num_bytes = finder.shape(key, 4)
        finder.require("scales" in parts and num_bytes == 16, key)
        scales = finder.shape(parts["scales"], 3)
        finder.require(scales == (count, rows, num_groups), parts["scales"])
        for part in parts.values():
            finder.require_kind(part, torch.uint8)
        groups[base] = _Group(
            shape=(count, num_groups * 32, rows),
            parts=parts,
            by_entry=frozenset({"blocks", "scales"}),
            make=_from_mxfp4,
        )
    return groups


def _from_mxfp4(parts: Parts, start: int, stop: int) -> Tensor:
    values = torch.tensor([*_E2M1, *(-it for it in _E2M1)])
    blocks = parts["blocks"]
    numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    scaled = torch.ldexp(numbers.flatten(-2), parts["scales"].int().unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(1, 2)


_METHODS: Final[dict[str, Callable[[_Finder], dict[str, _Group]]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}
