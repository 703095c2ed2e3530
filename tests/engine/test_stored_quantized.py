"""Checkpoints that are stored quantized give the logits of the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.stage_loading import load_stage
from proto.errors import ModelError
from tests.support.local_chain import Chain, open_entry
from tests.support.models import VOCAB, save_tiny

IDS = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TOLERANCE = 1e-4

Stored = dict[str, Tensor]  # by what stands behind the module's path
# Weights (out, in) that a layout can hold, and how it holds them.
Layout = Callable[[int, int], tuple[Tensor, Stored]]


def whole(rows: int, columns: int, below: int) -> Tensor:
    return torch.randint(below, (rows, columns))


def scales(*shape: int) -> Tensor:
    return (torch.rand(shape) * 0.05 + 0.02).half()


def words(numbers: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Rows of small numbers, several to 32 bits, the first in the lowest bits."""
    each = 32 // bits
    rows = []
    for row in numbers.tolist():
        row += [0] * (-len(row) % each)
        packed = []
        for at in range(0, len(row), each):
            some = [row[at + it] for it in (order or range(each))]
            word = sum(number << bits * place for place, number in enumerate(some))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def gptq(
    bits: int, *, group: int = 32, is_v2: bool = False, is_ordered: bool = False
) -> tuple[Layout, dict[str, Any]]:
    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        count = in_features // group
        numbers = whole(in_features, out_features, 2**bits)
        zeros = whole(count, out_features, 2**bits - 1) + 1
        sizes = scales(count, out_features) / 2 ** max(0, bits - 4)
        groups = torch.arange(in_features) // group
        if is_ordered:
            groups = groups[torch.randperm(in_features)]
        weight = ((numbers - zeros[groups]) * sizes[groups].float()).t()
        stored = {
            "qweight": words(numbers.t(), bits).t(),
            "qzeros": words(zeros - (0 if is_v2 else 1), bits),
            "scales": sizes,
            "g_idx": groups.int(),
        }
        return weight, stored

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": is_ordered}
    return layout, config | ({"checkpoint_format": "gptq_v2"} if is_v2 else {})


def awq() -> tuple[Layout, dict[str, Any]]:
    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        count = in_features // 32
        numbers, zeros = whole(in_features, out_features, 16), whole(count, out_features, 16)
        sizes = scales(count, out_features)
        groups = torch.arange(in_features) // 32
        weight = ((numbers - zeros[groups]) * sizes[groups].float()).t()
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        stored = {
            "qweight": words(numbers, 4, order),
            "qzeros": words(zeros, 4, order),
            "scales": sizes,
        }
        return weight, stored

    return layout, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def compressed(scheme: dict[str, Any], layout_format: str) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout_format,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def packed_integers(
    bits: int, *, is_symmetric: bool = True, is_ordered: bool = False
) -> tuple[Layout, dict[str, Any]]:
    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        count, half = in_features // 32, 2 ** (bits - 1)
        numbers = whole(out_features, in_features, 2**bits)
        sizes = scales(out_features, count).bfloat16() / 2 ** (bits - 4)
        groups = torch.arange(in_features) // 32
        stored = {
            "weight_packed": words(numbers, bits),
            "weight_scale": sizes,
            "weight_shape": torch.tensor([out_features, in_features]),
        }
        signed = numbers - half
        if is_ordered:
            groups = groups[torch.randperm(in_features)]
            stored["weight_g_idx"] = groups.int()
        if not is_symmetric:
            zeros = whole(out_features, count, 2**bits)
            stored["weight_zero_point"] = words(zeros.t(), bits).t()
            signed = signed - (zeros - half)[:, groups]
        return signed * sizes.float()[:, groups], stored

    scheme = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return layout, compressed(scheme, "pack-quantized")


def integers_a_row() -> tuple[Layout, dict[str, Any]]:
    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        numbers = (whole(out_features, in_features, 256) - 128).to(torch.int8)
        sizes = scales(out_features, 1).float() / 16
        return numbers * sizes, {"weight": numbers, "weight_scale": sizes}

    return layout, compressed(
        {"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"
    )


def floats_a_row() -> tuple[Layout, dict[str, Any]]:
    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        numbers = torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
        sizes = scales(out_features, 1).float() * 5
        return numbers.float() * sizes, {"weight": numbers, "weight_scale": sizes}

    scheme = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return layout, compressed(scheme, "float-quantized")


def float_blocks(block: list[int] | None) -> tuple[Layout, dict[str, Any]]:
    """As DeepSeek and Qwen store theirs; the last block of an axis may be smaller."""

    def layout(out_features: int, in_features: int) -> tuple[Tensor, Stored]:
        numbers = torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
        rows, columns = block or (out_features, in_features)
        sizes = scales(-(-out_features // rows), -(-in_features // columns)).float() * 5
        spread = sizes.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        weight = numbers.float() * spread[:out_features, :in_features]
        if out_features % rows == in_features % columns == 0:
            theirs = Fp8Dequantize(None)._dequantize_one(numbers, sizes)
            assert torch.equal(theirs, weight)
        return weight, {"weight": numbers, "weight_scale_inv": sizes if block else sizes.view(())}

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return layout, config | ({"weight_block_size": block} if block else {})


LAYOUTS = {
    "gptq 4 bits": gptq(4),
    "gptq 8 bits": gptq(8),
    "gptq 2 bits": gptq(2, group=16),
    "gptq with the order of its activations": gptq(4, is_ordered=True),
    "gptq v2": gptq(4, is_v2=True),
    "awq": awq(),
    "compressed-tensors 4 bits": packed_integers(4),
    "compressed-tensors 8 bits": packed_integers(8),
    "compressed-tensors with zero points": packed_integers(4, is_symmetric=False),
    "compressed-tensors in another order": packed_integers(4, is_ordered=True),
    "compressed-tensors int8": integers_a_row(),
    "compressed-tensors float8": floats_a_row(),
    "fp8 in blocks": float_blocks([32, 64]),
    "fp8 in blocks that do not divide": float_blocks([64, 40]),
    "fp8 with one scale": float_blocks(None),
}


def save_quantized(
    kind: str, folder: Path, layout: Layout, config: dict[str, Any], **sizes: Any
) -> Any:
    """A tiny checkpoint whose layers are stored in that layout, and the model they stand for."""
    torch.manual_seed(3)
    save_tiny(kind, folder, **SIZES, **sizes)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for key, weight in tensors.items():
        if ".layers." in key and key.endswith("proj.weight") and weight.ndim == 2:
            made, stored = layout(*weight.shape)
            plain[key] = made.contiguous()
            stored = {key.removesuffix("weight") + name: it for name, it in stored.items()}
            tensors = {name: it for name, it in tensors.items() if name != key} | stored
    reference(kind, folder, plain, **sizes)
    save_file({name: it.contiguous() for name, it in tensors.items()}, folder / "model.safetensors")
    change_config(folder, quantization_config=config)
    return reference(kind, folder.with_name("plain"), plain, **sizes)


def reference(kind: str, folder: Path, plain: Stored, **sizes: Any) -> Any:
    """The model with these weights, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    save_tiny(kind, folder, **SIZES, **sizes)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(folder: Path, **settings: Any) -> Tensor:
    stages = [
        load_stage(str(folder), sections=2, index=it, dtype="float32", device="cpu", **settings)
        for it in range(2)
    ]
    return Chain(open_entry(folder), stages).prefill(IDS)


def error(ours: Tensor, model: Any) -> float:
    with torch.no_grad():
        theirs = model(torch.tensor([IDS]), use_cache=False).logits[0]
    assert float(theirs.std()) > 0.1
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_weights_that_are_stored(name: str, tmp_path: Path) -> None:
    model = save_quantized("llama", tmp_path / "stored", *LAYOUTS[name])
    assert error(logits_of(tmp_path / "stored"), model) < TOLERANCE


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """Each is worked out by itself, and then stacked."""
    torch.manual_seed(3)
    layout, config = float_blocks([32, 32])
    model = save_quantized("qwen3_moe", tmp_path / "stored", layout, config)
    assert error(logits_of(tmp_path / "stored"), model) < TOLERANCE


def test_experts_in_microscaling_floats(tmp_path: Path) -> None:
    """As GPT-OSS is published: 4-bit floats, 32 to a power of two."""
    torch.manual_seed(3)
    folder = tmp_path / "stored"
    save_tiny("gpt_oss", folder, **SIZES)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for key, weight in tensors.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = weight.shape
            blocks = torch.randint(256, (count, rows, columns // 32, 16)).to(torch.uint8)
            powers = torch.randint(122, 126, (count, rows, columns // 32)).to(torch.uint8)
            plain[key] = convert_moe_packed_tensors(blocks, powers, dtype=torch.float32)
            assert plain[key].shape == weight.shape
            stored = {f"{key}_blocks": blocks, f"{key}_scales": powers}
            tensors = {name: it for name, it in tensors.items() if name != key} | stored
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    model = reference("gpt_oss", tmp_path / "plain", plain)
    assert error(logits_of(folder), model) < TOLERANCE


def test_they_can_be_rounded_anew(tmp_path: Path) -> None:
    model = save_quantized("llama", tmp_path / "stored", *LAYOUTS["gptq 4 bits"])
    ours = logits_of(tmp_path / "stored", quantize="int8")
    with torch.no_grad():
        theirs = model(torch.tensor([IDS]), use_cache=False).logits[0]
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, version gemv with 4 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors, format nvfp4-pack-quantized",
        ),
    ],
)
def test_a_layout_that_is_not_known_is_refused_by_name(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path)
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(ModelError) as refusal:
        load_stage(str(tmp_path), layers=(0, 2), device="cpu")
    assert f"is stored quantized ({config['quant_method']}" in str(refusal.value)
    assert named in str(refusal.value) and "take the checkpoint it was made from" in str(
        refusal.value
    )


def test_parts_that_do_not_fit_each_other_are_named(tmp_path: Path) -> None:
    save_quantized("llama", tmp_path / "stored", *LAYOUTS["gptq 4 bits"])
    tensors = load_file(tmp_path / "stored" / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.scales"
    tensors[key] = tensors[key][:, 8:].contiguous()
    save_file(tensors, tmp_path / "stored" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj\.scales of shape"):
        load_stage(str(tmp_path / "stored"), layers=(0, 2), device="cpu")


# --- parts that somebody made to do harm -----------------------------------------------------

NAN = float("nan")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each layout, made once."""
    base = tmp_path_factory.mktemp("stored")

    def of(name: str) -> Path:
        folder = base / name.replace(" ", "-")
        if not folder.exists():
            save_quantized("llama", folder, *LAYOUTS[name])
        return folder

    return of


def refusal(folder: Path, quantize: str = "none") -> str:
    with pytest.raises(ModelError) as refused:
        load_stage(str(folder), layers=(0, 2), device="cpu", quantize=quantize)
    said = str(refused.value)
    assert said.isprintable() and len(said) < 500, said
    return said


def spoilt(source: Path, target: Path, suffix: str, spoil: Callable[[Tensor], Tensor]) -> Path:
    """A copy in which one tensor is another."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    key = f"model.layers.0.self_attn.q_proj.{suffix}"
    tensors[key] = spoil(tensors[key]).contiguous()
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("gptq 4 bits", {"bits": it}) for it in (4.0, "4", True, 0, -4, 10**9, NAN, None, [4])),
        ("gptq 4 bits", {"bits": 8}),
        ("gptq 4 bits", {"checkpoint_format": ["gptq"]}),
        ("gptq 4 bits", {"checkpoint_format": "gptq\x1b[2J\n"}),
        ("gptq 4 bits", {"quant_method": "awq"}),
        ("gptq 4 bits", {"quant_method": "mxfp4"}),
        *(("awq", {"version": it}) for it in (["gemm"], None, 7)),
        ("awq", {"bits": [4]}),
        *(("compressed-tensors 4 bits", {"format": it}) for it in (["x"], 7)),
        ("compressed-tensors 4 bits", {"sparsity_config": {"format": ["x"]}}),
        *(
            ("compressed-tensors 4 bits", {"config_groups": it})
            for it in ([1], None, {}, {"a": "x"}, {"a": {"weights": [1]}})
        ),
        *(
            ("compressed-tensors 4 bits", {"config_groups": {"a": {"weights": {"num_bits": it}}}})
            for it in ([4], 3, 4.0, NAN, "4", 8)
        ),
    ],
    ids=str,
)
def test_a_config_of_a_layout_that_makes_no_sense(
    name: str, values: dict[str, Any], stored: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(stored(name), tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "model", quantization_config=said | values)
    assert refusal(tmp_path / "model").startswith("model")


SPOILT: dict[tuple[str, str], list[Callable[[Tensor], Tensor]]] = {
    ("gptq 4 bits", "qweight"): [
        Tensor.float, Tensor.long, Tensor.flatten, lambda it: it[:0], lambda it: it[:1],
    ],
    ("gptq 4 bits", "scales"): [
        Tensor.int, lambda it: torch.cat([it, it]), lambda it: it[:, 1:], lambda it: it * NAN,
    ],
    ("gptq 4 bits", "qzeros"): [Tensor.float, lambda it: it[:, 1:], lambda it: it[:1]],
    ("gptq with the order of its activations", "g_idx"): [
        lambda it: it + 1000, lambda it: it - 1, lambda it: it.long() + 2**62, Tensor.float,
        Tensor.bool, lambda it: it[1:], lambda it: it[None],
    ],
    ("awq", "qzeros"): [Tensor.float, lambda it: it[:, 1:]],
    ("awq", "scales"): [Tensor.bool, lambda it: it[:, :0]],
    ("compressed-tensors 4 bits", "weight_packed"): [Tensor.float, lambda it: it[:, 1:]],
    ("compressed-tensors 4 bits", "weight_scale"): [
        Tensor.int, lambda it: it[:1], lambda it: it.flatten()[:3], lambda it: it[:, :0],
    ],
    ("compressed-tensors with zero points", "weight_zero_point"): [
        Tensor.float, lambda it: it[:1],
    ],
    ("compressed-tensors in another order", "weight_g_idx"): [lambda it: it + 99, Tensor.float],
    ("compressed-tensors int8", "weight"): [lambda it: it.view(torch.uint8)],
    ("compressed-tensors float8", "weight_scale"): [Tensor.int, lambda it: it.flatten()[:3]],
    ("fp8 in blocks", "weight_scale_inv"): [
        Tensor.int, lambda it: it.flatten()[:0], lambda it: it[None], lambda it: it * float("inf"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "suffix", "at"),
    [(*key, at) for key, ways in SPOILT.items() for at in range(len(ways))],
)
def test_a_part_of_a_weight_that_makes_no_sense(
    name: str, suffix: str, at: int, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = spoilt(stored(name), tmp_path / "model", suffix, SPOILT[name, suffix][at])
    said = refusal(folder)
    assert said.startswith("model") or "NaN" in said
    assert refusal(folder, "int8")


def test_groups_are_as_large_as_the_scales_say(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """A config that says otherwise changes nothing; scales that do not divide are refused."""
    expected = logits_of(stored("gptq 4 bits"))
    shutil.copytree(stored("gptq 4 bits"), tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    for size in (7, -1, 0, 10**12, NAN, "x", [32], True):
        change_config(tmp_path / "model", quantization_config=said | {"group_size": size})
        assert torch.equal(logits_of(tmp_path / "model"), expected)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for suffix in ("scales", "qzeros"):
        key = f"model.layers.0.mlp.down_proj.{suffix}"
        tensors[key] = torch.cat([tensors[key]] * 2)[:5]  # 96 inputs in 5 groups
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert "down_proj.scales of shape [5, 64]" in refusal(tmp_path / "model")


def test_an_order_of_inputs_that_was_not_filled_in_is_none(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """compressed-tensors writes -1 for all of them where nothing was reordered."""
    expected = logits_of(stored("compressed-tensors 4 bits"))
    folder = shutil.copytree(stored("compressed-tensors 4 bits"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for key in [it for it in tensors if it.endswith("weight_packed")]:
        in_features = tensors[key].shape[1] * 8
        tensors[key.replace("packed", "g_idx")] = torch.full((in_features,), -1)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits_of(folder), expected)
