"""Quantized stages compute what their rounded weights say, for every architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.adapters import load_adapter
from engine.attention import StageRun
from engine.checkpoint_source import DEMO_MODEL
from engine.entry import load_entry
from engine.experts import PackedExperts
from engine.kernels import native
from engine.packed_linear import PackedLinear, fused_of
from engine.selfcheck import relative_error
from engine.stage import Stage
from engine.stage_loading import load_stage
from proto.errors import UsageError
from tests.support.adapters import adapted, logits_of
from tests.support.local_chain import Chain, open_entry
from tests.support.memory import measured
from tests.support.models import KINDS, VOCAB, save_tiny

IDS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
EXACT = 1e-4  # of logits, as for weights that are not rounded
# Kernels round activations to 8 bits, or to bfloat16 in longer steps: these layers of random
# weights amplify that, and a token may go to another expert. A mistake gives 1 and more.
BY_KERNELS = 0.35


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """By torch alone a quantized matrix is exactly the one that it stands for."""
    with native.chosen("torch"):
        yield


def load(folder: Path, quantize: str, **settings: Any) -> Chain:
    settings = {"dtype": "float32", "quantize_head": "same", **settings}
    stage = load_stage(
        str(folder), sections=1, index=0, device="cpu", quantize=quantize, **settings
    )
    return Chain(open_entry(folder, settings["dtype"]), [stage])


def rounded(model: Any, stage: Stage) -> Any:
    """The model with the weights that the stage's stand for."""
    modules = dict(model.named_modules())
    for path, packed in stage.packed.modules.items():
        module = modules[path]
        if isinstance(packed, PackedLinear):
            weight = packed.rows(0, packed.out_features)
            is_transposed = not isinstance(module, nn.Linear)
            module.weight = nn.Parameter((weight.t() if is_transposed else weight).contiguous())
            continue
        assert isinstance(packed, PackedExperts)
        for leaf in packed.packed_leaves:
            experts = [
                packed.expert(leaf, it).unpack(torch.float32) for it in range(packed.num_experts)
            ]
            weight = torch.stack([it.t() if module.is_transposed else it for it in experts])
            setattr(module, leaf, nn.Parameter(weight.contiguous()))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.tensor([IDS]), use_cache=False).logits[0]
    return result


# --- every architecture ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_rounded_weights(kind: str, tmp_path: Path) -> None:
    """Exactly by torch, and about so by the kernels, whole and in chunks."""
    model = save_tiny(kind, tmp_path)
    plain = logits(model)
    with exact_arithmetic():
        chain = load(tmp_path, "int4")
        theirs = logits(rounded(model, chain.stages[0]))
        ours = chain.prefill(IDS, chunk_tokens=23)
    assert float((ours - theirs).abs().max()) < EXACT
    assert float((theirs - plain).abs().max()) > 100 * EXACT  # rounded they are
    chain = load(tmp_path, "int8")
    theirs = logits(rounded(model, chain.stages[0]))
    for chunk_tokens in (len(IDS), 7):
        ours = chain.prefill(IDS, chunk_tokens=chunk_tokens)
        assert relative_error(ours, theirs) < BY_KERNELS
    assert chain.stages[0].packed.read_as_weights() == []


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_every_matrix_of_the_layers_is_quantized_but_routers_and_odd_sizes(
    kind: str, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path, hidden_size=128, intermediate_size=128)
    with exact_arithmetic():
        (stage,) = load(tmp_path, "int4").stages
    matrices = [
        (name, it.numel())
        for name, it in stage._model.named_parameters()
        if it.ndim > 1 and "bias" not in name and it.numel() and not it.is_meta
    ]
    assert all(size <= 4 * 128 for _, size in matrices), matrices  # routers to 4 experts
    assert stage.packed.left_bytes <= 4 * 128 * 4 * 4


def test_experts_of_a_kind_of_their_own_stay_as_they_are_and_are_counted(tmp_path: Path) -> None:
    save_tiny("llama4", tmp_path)
    with exact_arithmetic():
        (stage,) = load(tmp_path, "int8").stages
    experts = sum(it.numel() * 4 for it in stage._model.parameters() if it.ndim == 3)
    assert experts <= stage.packed.left_bytes
    assert "experts" in stage.packed.left_example


# --- what is held ------------------------------------------------------------------------------


def test_siblings_of_one_input_lie_in_one_matrix(tmp_path: Path) -> None:
    save_tiny("llama_biases", tmp_path)
    with exact_arithmetic():
        (stage,) = load(tmp_path, "int8").stages
    layer = stage._model.model.layers[1].inner
    qkv, gate_up = fused_of(layer.self_attn)["qkv"], fused_of(layer.mlp)["gate_up"]
    assert qkv.sizes == (32, 16, 16) and gate_up.sizes == (48, 48)
    given = torch.randn(3, 32)
    with exact_arithmetic():
        together = qkv.matrix.matmul(given, qkv.bias)
        each = [getattr(layer.self_attn, f"{it}_proj")(given) for it in "qkv"]
    assert torch.allclose(together, torch.cat(each, 1), atol=1e-6)
    own = layer.self_attn.k_proj
    assert own.bias.data_ptr() == qkv.bias[32:48].data_ptr()
    assert own.matrix.data.data_ptr() == qkv.matrix.part(32, 48).data.data_ptr()


def test_a_stage_holds_the_packed_bytes_and_says_so(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
    save_tiny("llama", tmp_path, dtype=torch.bfloat16, **sizes)
    held = {
        (quantize, head): load_stage(
            str(tmp_path), sections=1, index=0, quantize=quantize, quantize_head=head, device="cpu"
        ).stage_bytes
        for quantize, head in [
            ("none", "auto"),
            ("int8", "auto"),
            ("int4", "auto"),
            ("int4", "same"),
        ]
    }
    plain = held["none", "auto"]
    head_bytes = 1024 * 256
    assert held["int8", "auto"] == pytest.approx(plain / 2, rel=0.03)
    # 4 bits, and 16 of scale for each 32
    assert held["int4", "same"] == pytest.approx(plain / 2 * 0.5625, rel=0.03)
    saved = held["int4", "auto"] - held["int4", "same"]
    assert saved == pytest.approx(head_bytes * (1 - 0.5625), rel=0.05)


def test_a_tied_head_is_a_packed_copy(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    stage = load_stage(str(tmp_path), layers=(3, 4), quantize="int8", device="cpu")
    head = stage.packed.modules["lm_head"]
    assert isinstance(head, PackedLinear) and head.out_features == VOCAB


def test_two_asked_wrongly_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(UsageError, match="--quantize 'int3'"):
        load(tmp_path, "int3")
    with pytest.raises(UsageError, match="--quantize-head 'int3'"):
        load(tmp_path, "int8", quantize_head="int3")


LOAD = """
from engine.stage_loading import load_stage
def load(folder, num_layers):
    return load_stage(
        folder, layers=(0, num_layers), dtype="bfloat16", device="cpu", quantize="int4"
    )
for folder in sys.argv[1:3]:  # imports, first uses
    load(folder, 4)
for folder, num_layers in zip(sys.argv[3:5], (8, 5)):
    start()
    stage = load(folder, num_layers)
    print(growth(), stage.stage_bytes)
"""


def test_the_16_bit_stage_is_never_in_memory(tmp_path: Path) -> None:
    """60 MB of weights become 17; the largest parameter is 2 MB, or 8 where experts are stacked."""
    if native.library is None:
        pytest.skip("torch alone packs with several times a part's memory")
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    sizes_of = {
        "llama": sizes,
        "mixtral": sizes | {"num_hidden_layers": 5, "intermediate_size": 1024},
    }
    stored = []
    for kind, large in sizes_of.items():
        save_tiny(kind, tmp_path / f"small-{kind}")
        model = save_tiny(kind, tmp_path / kind, dtype=torch.bfloat16, **large)
        stored.append(sum(it.numel() * 2 for it in model.parameters()))
    folders = [tmp_path / f"{size}{kind}" for size in ("small-", "") for kind in sizes_of]
    found = measured(LOAD, *folders)
    for peak, held, plain in zip(found[::2], found[1::2], stored, strict=True):
        print(f"peak {peak} bytes for {held} of {plain}")  # pytest -rP shows it
        assert held < 0.35 * plain
        assert peak < held + 12 * 2**20


UNLOAD = """
from engine.stage_loading import load_stage
for folder in sys.argv[1:]:
    for quantize in ("none", "int4"):
        stage = load_stage(
            folder, layers=(0, 5), dtype="bfloat16", device="cpu", quantize=quantize
        )
        before = resident("VmRSS")
        stage.unload()
        print(stage.stage_bytes, before - resident("VmRSS"))
"""


def test_an_unloaded_stage_gives_its_memory_back(tmp_path: Path) -> None:
    """Whether its weights are packed in 16 bits or in 4, and whether they are experts'."""
    large = {"hidden_size": 512, "num_hidden_layers": 5, "intermediate_size": 1024}
    for kind in ("llama", "mixtral"):
        save_tiny(kind, tmp_path / kind, dtype=torch.bfloat16, **large)
    found = measured(UNLOAD, tmp_path / "llama", tmp_path / "mixtral")
    for held, freed in zip(found[::2], found[1::2], strict=True):
        print(f"{freed} of {held} bytes freed")  # pytest -rP shows it
        assert freed > 0.8 * held


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("llama_biases", {"use_dora": True}), ("gpt2", {"use_dora": True})],
)
def test_adapters_are_added_to_the_rounded_weights(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny(kind, tmp_path / "model")
    with exact_arithmetic():
        chain = load(tmp_path / "model", "int8")
        (stage,) = chain.stages
        theirs = adapted(rounded(model, stage), tmp_path / "adapter", **settings)
        adapter = load_adapter(str(tmp_path / "adapter"), stage)
        ids, blocks = torch.tensor(IDS), torch.arange(3)
        run = StageRun(
            start=0, num_tokens=len(IDS), rope_length=len(IDS), blocks=blocks, adapter=adapter
        )
        entered = chain.entry.embed(ids, range(len(IDS)))
        hidden = stage.forward(ids, entered, [run], stage.new_cache(3))
        ours = stage.logits(hidden, [adapter] * len(IDS))
    assert float((ours - logits_of(theirs, IDS)).abs().max()) < EXACT


# --- quality -----------------------------------------------------------------------------------


def test_perplexity_on_held_out_text_rises_by_little() -> None:
    """As a prompt comes, and by the kernels of decode steps, which round activations too."""
    from bench.quality import WAYS, measure

    text = (DEMO_MODEL / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = load_entry(None).tokenizer
    assert tokenizer is not None
    token_ids = tokenizer.encode(text, verbose=False)[:2048]
    ways = [it for it in WAYS if it[0] not in ("bfloat16", "int4, KV int8")]
    found = {(it.weights, it.path): it.perplexity for it in measure(None, token_ids, ways)}
    plain = found["float32", "prompt"]
    bounds = {"KV int8": 0.005, "int8": 0.005, "int4": 0.03, "int4, head too": 0.05}
    for weights, path in product(bounds, ("prompt", "decode")):
        more = found[weights, path] / plain - 1
        print(f"{weights}, {path}: {more:+.2%}")  # pytest -rP shows it
        assert abs(more) < bounds[weights]
