"""Weights that are stored as packed integers, with a scale and a zero point for a group of inputs.

GPTQ's and AWQ's layouts, and the like one of compressed-tensors. Knows where the bits lie; reads no
tensor, and knows nothing of models.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.stored_group import Finder, Group, Parts, plain

_INDICES: Final = (torch.int32, torch.int64)
# AWQ packs 8 columns of a row into 32 bits in this order (github.com/casper-hansen/AutoAWQ).
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(finder: Finder) -> dict[str, Group]:
    """GPTQ: integers and zero points packed along inputs and outputs, a scale a group of inputs.

    Layout: github.com/AutoGPTQ/AutoGPTQ (v1: zero points are stored less one) and GPTQModel (v2).
    """
    bits = finder.config.get("bits")
    if type(bits) is not int or bits not in (2, 4, 8):
        raise finder.unknown(f"{plain(bits)} bits")
    layout = finder.config.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise finder.unknown(f"checkpoint_format {plain(layout)}")
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

        groups[f"{base}.weight"] = Group(shape=(out_features, in_features), parts=parts, make=make)
    return groups


def awq(finder: Finder) -> dict[str, Group]:
    """AWQ: integers and zero points packed along outputs, a scale a group of inputs."""
    bits, version = finder.config.get("bits", 4), finder.config.get("version", "gemm")
    if type(bits) is not int or bits != 4 or str(version).lower() != "gemm":
        raise finder.unknown(f"version {plain(version)} with {plain(bits)} bits")
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

        groups[f"{base}.weight"] = Group(shape=(packed * 8, in_features), parts=parts, make=make)
    return groups


def packed_integers(finder: Finder, base: str, bits: int, group_size: object) -> Group:
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
    _check_order(finder, parts, in_features)
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

    return Group(
        shape=(out_features, in_features),
        parts=parts,
        by_entry=frozenset({"packed", "scales"}),
        make=make,
    )


def _check_group(
    finder: Finder, parts: dict[str, str], in_features: int, out_features: int, each: int
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
    _check_order(finder, parts, in_features)
    return finder.group_size(finder.config.get("group_size"), parts["scales"], in_features, count)


def _check_order(finder: Finder, parts: dict[str, str], in_features: int) -> None:
    """See that every input's group is listed, where any is."""
    if "order" in parts:
        finder.require(finder.shape(parts["order"], 1) == (in_features,), parts["order"])
        finder.require_kind(parts["order"], *_INDICES)


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
