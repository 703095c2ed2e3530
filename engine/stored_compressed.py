"""What compressed-tensors stores, by what config.json says of it.

Knows the words of that config and the names of the tensors; the numbers themselves are
`engine.stored_integers`' and `engine.stored_scaled`'s. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from engine.json_file import shown
from engine.stored_group import Finder, Group, plain
from engine.stored_integers import packed_integers
from engine.stored_scaled import FLOAT8, scaled_numbers

_FORMATS: Final = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
)


def compressed(finder: Finder) -> dict[str, Group]:
    """compressed-tensors: packed integers in groups, or float8 and int8 with scales."""
    config = finder.config
    sparsity = _table(config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise finder.unknown(f"sparsity {plain(sparsity)}")
    config_groups = _table(config, "config_groups")
    schemes = [_table(it, "weights") for it in config_groups.values() if isinstance(it, dict)]
    for said in (config.get("format"), *(it.get("format") for it in schemes)):
        if said not in (None, *_FORMATS):
            raise finder.unknown(f"format {plain(said)}")
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
            groups[f"{base}.weight"] = packed_integers(finder, base, bits, group_size)
        elif f"{base}.weight" in finder.checkpoint:
            zeros = f"{base}.weight_zero_point"
            kinds = (*FLOAT8, torch.int8)
            groups[f"{base}.weight"] = scaled_numbers(
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
