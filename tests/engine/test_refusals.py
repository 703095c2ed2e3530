"""What cannot run is refused at load, in one sentence that says what, where and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.entry import load_entry
from engine.stage_loading import load_stage
from proto.errors import Error, ModelError, ModelUnfit, SplitError, UsageError
from tests.support.local_chain import open_entry
from tests.support.models import save_tiny, shaken

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def refusal(folder: Path | str, kind: type[Error] = ModelError, **settings: Any) -> str:
    """What a worker says on its way out; one line of text for people."""
    settings = {"layers": (0, 1), "dtype": "float32", "device": "cpu", **settings}
    with pytest.raises(kind) as caught:
        load_stage(str(folder), **settings)
    return one_line(caught.value)


def one_line(error: Error) -> str:
    said = str(error)
    assert "\n" not in said
    assert 20 < len(said) < 400, said
    assert error.exit_code == 2
    return said


# --- architectures ---------------------------------------------------------------------------

UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=4, n_head=4),
        "BloomForCausalLM cannot be split: .*attention interface",
    ),
    "mpt": (
        lambda: transformers.MptConfig(vocab_size=128, d_model=32, n_layers=4, n_heads=4),
        "MptForCausalLM cannot be split",
    ),
    "gptj": (
        lambda: transformers.GPTJConfig(
            vocab_size=128, n_embd=32, n_layer=4, n_head=4, rotary_dim=4
        ),
        "GPTJForCausalLM cannot be split: .*attention interface",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
        ),
        "FalconForCausalLM cannot be split: .*attention interface",
    ),
    "gpt_neo": (
        lambda: transformers.GPTNeoConfig(
            vocab_size=128,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
        ),
        "GPTNeoForCausalLM cannot be split: .*attention interface",
    ),
    "codegen": (
        lambda: transformers.CodeGenConfig(
            vocab_size=128, n_embd=32, n_layer=4, n_head=4, rotary_dim=4
        ),
        "CodeGenForCausalLM cannot be split: .*attention interface",
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(
            **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2
        ),
        "Lfm2ForCausalLM cannot be split: its layer 0 is 'conv'.*state other than keys and values",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4),
        "MambaForCausalLM cannot be split: .*state other than keys and values",
    ),
    "minimax": (
        lambda: transformers.MiniMaxConfig(**SIZES, num_key_value_heads=2),
        "MiniMaxForCausalLM cannot be split: its layer 1 is 'linear_attention'",
    ),
    "doge": (
        lambda: transformers.DogeConfig(**SIZES, num_key_value_heads=2),
        "DogeAttention makes an attention mask of its own",
    ),
    "llama that sees later tokens": (
        lambda: transformers.LlamaConfig(**SIZES, is_causal=False),
        "LlamaAttention makes an attention mask of its own",
    ),
    "rwkv": (
        lambda: transformers.RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4),
        "RwkvForCausalLM cannot be split",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_architecture_that_would_come_out_wrong_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    make_config, pattern = UNFIT[kind]
    model = transformers.AutoModelForCausalLM.from_config(make_config())
    shaken(model).save_pretrained(tmp_path)
    assert_match(pattern, refusal(tmp_path, ModelUnfit))
    assert_match(pattern, refusal(tmp_path, ModelUnfit, layers=(2, 4)))


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        ("RobertaConfig", {"is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 99}),
        ("MBartConfig", {"vocab_size": 128, "d_model": 32, "decoder_layers": 4}),
    ],
)
def test_embeddings_that_count_positions_their_own_way_are_refused(
    config_class: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = getattr(transformers, config_class)(**{**SIZES, **settings})
    shaken(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    with pytest.raises(ModelUnfit, match="counts positions in a way of its own") as caught:
        open_entry(tmp_path)
    one_line(caught.value)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=4, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert tmp_path.name in said
    assert "encoder-decoder (t5)" in said


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert_match(f"{tmp_path.name} is of type 'vit'.*no causal language model", refusal(tmp_path))


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path, max_shard_size="30KB")
    return tmp_path


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_match(pattern: str, said: str) -> None:
    import re

    assert re.search(pattern, said), said


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_match(f"{tmp_path}/nowhere: there is no such folder", refusal(tmp_path / "nowhere"))
    assert_match("./nowhere: there is no such folder", refusal("./nowhere"))
    assert_match("a/b/c: there is no such folder", refusal("a/b/c"))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert_match(f"{tmp_path} is empty", refusal(tmp_path))


def test_a_file_instead_of_a_folder(llama: Path) -> None:
    assert_match(f"{SINGLE} is a file: name the folder", refusal(llama / SINGLE))


def test_a_folder_without_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert_match(f"{llama} holds no config.json", refusal(llama))


def test_a_folder_without_weights(llama: Path) -> None:
    (llama / SINGLE).unlink()
    assert_match(f"{llama} holds neither {SINGLE} nor {INDEX}", refusal(llama))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(llama: Path, file: str) -> None:
    (llama / SINGLE).rename(llama / file)
    said = refusal(llama)
    assert_match(f"{llama} holds {file} but no safetensors", said)
    assert "save_pretrained" in said


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", '{"a": ' + "[" * 100_000])
def test_a_config_that_is_not_json(llama: Path, text: str) -> None:
    (llama / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert str(llama / "config.json") in refusal(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "a_type_of_next_year"},
        {"model_type": None},
        {"num_hidden_layers": "four"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 5},
        {"hidden_act": "no_such_function"},
        {"vocab_size": -1},
        {"rope_parameters": {"rope_type": "no_such_type"}},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_used(llama: Path, changes: dict[str, Any]) -> None:
    change_json(llama / "config.json", **changes)
    said = refusal(llama)
    assert llama.name in said or "LlamaForCausalLM" in said


@pytest.mark.parametrize("method", ["hqq", "aqlm", "bitsandbytes"])
def test_a_quantized_checkpoint(llama: Path, method: str) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert_match(rf"{llama.name} is stored quantized \({method}\)", refusal(llama))


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "", 7])
def test_an_index_that_leads_out_of_the_folder(sharded: Path, file: Any) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    weight_map["model.norm.weight"] = file
    change_json(sharded / INDEX, weight_map=weight_map)
    said = refusal(sharded)
    assert INDEX in said and "model.norm.weight" in said and repr(file) in said


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"], ids=repr)
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    change_json(sharded / INDEX, weight_map=weight_map)
    assert_match(f"{INDEX} of {sharded.name} has no weight_map", refusal(sharded))


def test_an_index_that_names_a_file_which_lacks_the_tensor(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    key = "model.layers.0.self_attn.q_proj.weight"
    weight_map[key] = weight_map["model.norm.weight"]
    change_json(sharded / INDEX, weight_map=weight_map)
    assert_match(f"{weight_map[key]} does not hold tensor '{key}'", refusal(sharded))


# --- safetensors -----------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100])
def test_a_header_that_is_cut_off(llama: Path, num_bytes: int) -> None:
    path = llama / SINGLE
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_match(f"{path} is not a safetensors file, or is truncated in its", refusal(llama))


def test_a_file_of_another_kind(llama: Path) -> None:
    (llama / SINGLE).write_bytes(b"<!DOCTYPE html><html>404</html>" * 10)
    assert_match(f"{llama / SINGLE} is not a safetensors file", refusal(llama))


def test_a_placeholder_of_git_lfs(llama: Path) -> None:
    (llama / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    )
    assert_match(f"{llama / SINGLE} is not a safetensors file", refusal(llama))


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff\xff", b'{"a": ' + b"[" * 100_000])
def test_a_header_that_is_not_a_json_object(llama: Path, header: bytes) -> None:
    write_header(llama / SINGLE, header, b"")
    assert_match(f"{llama / SINGLE} has a damaged header", refusal(llama))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F4000", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
        {"dtype": "F32", "shape": "22", "data_offsets": "ab"},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32"},
        7,
        None,
    ],
    ids=str,
)
def test_a_header_entry_that_does_not_fit(llama: Path, entry: Any) -> None:
    path = llama / SINGLE
    header, data = header_of(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    header[key] = entry
    write_header(path, json.dumps(header).encode(), data)
    assert_match(f"{path}: tensor '{key}'", refusal(llama))


def test_a_tensor_behind_the_end_of_the_file(llama: Path) -> None:
    path = llama / SINGLE
    header, data = header_of(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    start, stop = header[key]["data_offsets"]
    header[key]["data_offsets"] = [start + 2**40, stop + 2**40]
    write_header(path, json.dumps(header).encode(), data)
    assert_match(f"{path} is truncated: tensor '{key}'", refusal(llama))


# --- tensors ---------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def test_a_tensor_of_a_shape_that_the_config_does_not_want(llama: Path) -> None:
    change_json(llama / "config.json", intermediate_size=64)
    said = refusal(llama)
    assert_match(r"layers\.0\.mlp\.\w+.weight has shape \[.*48.*\], .*wants \[.*64.*\]", said)
    assert llama.name in said


def test_an_embedding_of_a_shape_that_the_config_does_not_want(llama: Path) -> None:
    change_json(llama / "config.json", vocab_size=200)
    with pytest.raises(ModelError, match=r"embed_tokens.weight has shape \[128, 32\]") as caught:
        open_entry(llama)
    one_line(caught.value)


def test_tensors_that_are_missing(llama: Path) -> None:
    change_tensors(llama, lambda it: [it.pop(key) for key in list(it) if ".1." in key])
    assert_match(f"{llama.name} lacks 9 tensors .*model.layers.1", refusal(llama, layers=(1, 2)))
    assert load_stage(str(llama), layers=(0, 1)).num_layers == 4


def test_experts_of_which_one_is_missing(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    names = [key for key in load_file(tmp_path / SINGLE) if "experts.1." in key]
    assert names, "mixtral is saved with one tensor an expert"
    change_tensors(tmp_path, lambda it: [it.pop(key) for key in names])
    said = refusal(tmp_path)
    assert tmp_path.name in said and "experts" in said


def test_a_head_that_is_missing(llama: Path) -> None:
    change_tensors(llama, lambda it: [it.pop("lm_head.weight")])
    assert_match("lacks 1 tensors .*lm_head.weight", refusal(llama, layers=(3, 4)))


def test_an_embedding_that_is_missing(llama: Path) -> None:
    change_tensors(llama, lambda it: [it.pop("model.embed_tokens.weight")])
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*embed_tokens.weight"):
        open_entry(llama)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["self_attn.v_proj", "mlp.down_proj", "input_layernorm"])
def test_weights_that_are_no_numbers(llama: Path, place: str, bad: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.0.{place}.weight"].fill_(bad)

    change_tensors(llama, spoil)
    said = refusal(llama)
    assert "NaN" in said and "0" in said
    load_stage(str(llama), layers=(1, 4), device="cpu")


def test_a_head_that_is_no_numbers(llama: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].fill_(float("nan"))

    change_tensors(llama, spoil)
    said = refusal(llama, layers=(3, 4))
    assert "NaN" in said


def test_an_embedding_that_is_no_numbers(llama: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].fill_(float("nan"))

    change_tensors(llama, spoil)
    with pytest.raises(ModelError, match=f"the embeddings of {llama.name} hold NaN"):
        open_entry(llama)


# --- tokenizer, options ----------------------------------------------------------------------


def test_a_checkpoint_without_a_tokenizer_still_embeds_token_ids(llama: Path) -> None:
    entry = load_entry(str(llama), dtype="float32")
    assert entry.tokenizer is None
    assert len(entry.embed([1, 2], [0, 1])) == 2


def test_a_tokenizer_that_is_damaged(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"tokenizer of {llama.name} cannot be loaded") as caught:
        load_entry(str(llama), dtype="float32")
    one_line(caught.value)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"dtype": "int8"}, "--dtype 'int8': choose auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "--device 'tpu': choose auto, cpu, cuda or cuda:K"),
        ({"device": "meta"}, "--device 'meta': choose auto, cpu, cuda or cuda:K"),
        ({"device": "cuda:77"}, r"--device cuda:77: this machine has \d+ CUDA devices"),
        ({"layers": None}, "pass --sections N and --index I, or --layers A:B"),
        ({"layers": (0, 1), "sections": 2, "index": 0}, "--layers takes the place of"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(llama: Path, settings: dict[str, Any], pattern: str) -> None:
    assert_match(pattern, refusal(llama, UsageError, **settings))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"layers": (0, 5)}, "--layers 0:5 goes past the model's end: it has 4 layers"),
        ({"layers": (2, 2)}, "--layers 2:2 holds no layer"),
        ({"layers": (3, 1)}, "--layers 3:1 holds no layer"),
        ({"layers": None, "sections": 5, "index": 0}, "cannot split 4 layers over 5 sections"),
        ({"layers": None, "sections": 2, "index": 2}, "--index 2 is out of range"),
        ({"layers": None, "sections": 2, "index": -1}, "--index -1 is out of range"),
        ({"layers": None, "sections": 0, "index": 0}, "0 sections|--sections"),
    ],
    ids=str,
)
def test_sections_that_are_not_there(llama: Path, settings: dict[str, Any], pattern: str) -> None:
    assert_match(pattern, refusal(llama, SplitError, **settings))
