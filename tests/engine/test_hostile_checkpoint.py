"""A checkpoint may come from anybody: whatever its files say, they are data, and bounded.

Every case ends in one sentence, at the worker's side (`load_stage`), at the manager's
(`load_entry`), or at both; nothing hangs, nothing takes memory that the files do not have, and no
code of a checkpoint runs.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from engine.checkpoint import Checkpoint
from engine.entry import load_entry
from engine.foreign_code import foreign
from engine.stage_loading import load_stage
from engine.staged_copy import MARKER
from proto.errors import Error, ModelError
from tests.support.hub import COMMIT, REPO, fill_cache
from tests.support.memory import growth_limit
from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
KEY: Final = "model.layers.0.self_attn.q_proj.weight"
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about what it reads

Json = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny("llama", folder)
    save_tokenizer(folder, 128)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def _no_case_takes_memory() -> Iterator[None]:
    with growth_limit(400 * 2**20):
        yield


def worker_says(folder: Path, **settings: Any) -> str:
    """The sentence with which a worker refuses a checkpoint; "" where it takes it."""
    try:
        load_stage(str(folder), sections=1, index=0, device="cpu", **settings)
    except Error as error:
        return one_sentence(error)
    return ""


def manager_says(folder: Path) -> str:
    """The same of what the manager reads."""
    try:
        load_entry(str(folder))
    except Error as error:
        return one_sentence(error)
    return ""


def one_sentence(error: Error) -> str:
    said = str(error)
    assert said.isprintable() and 20 < len(said) < 600, said
    assert error.exit_code == 2
    return said


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- config.json -----------------------------------------------------------------------------

ABSURD: Final[list[Json]] = [
    *({"num_hidden_layers": it} for it in (10**9, 10**30, 4096, -3, 0, NAN, 4.0, "4", True)),
    *({"vocab_size": it} for it in (10**12, -1, "300", NAN, None, [300])),
    *({"hidden_size": it} for it in (10**12, 10**6, -32, 0, [32], 32.0)),
    *({"num_attention_heads": it} for it in (10**9, 0, -4, "4")),
    *({"num_key_value_heads": it} for it in (0, -1)),
    *({"head_dim": it} for it in (10**12, 10**9, 0, -8, 7, NAN)),
    *({"max_position_embeddings": it} for it in (10**18, -1, "x", NAN, [1])),
    *({"intermediate_size": it} for it in (-1, "x", NAN)),
    {"num_labels": 10**9},
    {"rms_norm_eps": "x"},
    {"initializer_range": NAN},
    {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": ["x"]}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1] * 10**5,
            "long_factor": [1],
            "original_max_position_embeddings": "x",
        }
    },
    {"layer_types": ["full_attention"] * 10**5},
    {"hidden_act": "__import__('os').system('id')"},
    {"model_type": "llama\x1b[31m\nx"},
    {"model_type": ["llama"]},
    {"model_type": "x" * 10**6},
    {"dtype": "float65"},
    {"dtype": ["x"]},
    {"pad_token_id": 10**12},
    {"text_config": "x"},
    {"id2label": "x"},
    {"attribute_map": {"hidden_size": "x"}},
    {"__class__": "x"},
    {"to_dict": "x"},
    {"is_encoder_decoder": True},
    *({"quantization_config": it} for it in ("x", [1], {"quant_method": ["gptq"]})),
    {"quantization_config": {"quant_method": "x\n\x1b"}},
]


@pytest.mark.parametrize("values", ABSURD, ids=lambda it: str(it)[:60].encode("unicode_escape"))
def test_an_absurd_config_is_refused_by_worker_and_manager(values: Json, folder: Path) -> None:
    change(folder / "config.json", **values)
    assert worker_says(folder)
    assert manager_says(folder)


@pytest.mark.parametrize("size", [10**8, 10**12])
@pytest.mark.parametrize("name", ["intermediate_size", "num_key_value_heads"])
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(
    name: str, size: int, folder: Path
) -> None:
    change(folder / "config.json", **{name: size})
    assert f"{folder.name}: tensor for model.layers.0." in worker_says(folder, dtype="bfloat16")
    assert "wants [" in worker_says(folder, quantize="int8")


@pytest.mark.parametrize(
    "values", [{"eos_token_id": it} for it in ("ab", 1.5, {"a": 1}, [[1], "x"])]
)
def test_ends_of_a_text_that_are_no_tokens_are_none(values: Json, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert all(type(it) is int for it in load_entry(str(folder)).eos_token_ids)


@pytest.mark.parametrize("what", ["large", "deep", "many values", "list", "digits"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX, "tokenizer.json"])
def test_json_without_end_is_refused_by_the_files_name(file: str, what: str, folder: Path) -> None:
    text = {
        "large": b'{"a": "' + b"x" * (64 * 2**20) + b'"}',
        "deep": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "many values": b'{"a": [' + b"[]," * 10**6 + b"[]]}",
        "list": b"[" * 10**5,
        "digits": b'{"a": ' + b"9" * 10**5 + b"}",
    }[what]
    (folder / file).write_bytes(text)
    said = manager_says(folder)
    assert (file in said) or (file == "tokenizer.json" and "tokenizer" in said)


# --- code ------------------------------------------------------------------------------------


class Opens:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._trace), "w")


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that code of the checkpoint would make."""
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()


def test_code_that_comes_with_a_checkpoint_is_not_run(folder: Path, trace: Path) -> None:
    code = f"open({str(trace)!r}, 'w')\n"
    for name in ("evil.py", "modeling_llama.py", "configuration_llama.py", "tokenization.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
    change(folder / "config.json", auto_map=auto_map, trust_remote_code=True)
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        trust_remote_code=True,
    )
    assert worker_says(folder) == ""  # a type that transformers knows needs no such code
    assert manager_says(folder) == ""
    change(folder / "config.json", model_type="evil")
    for said in (worker_says(folder), manager_says(folder)):
        assert "names code of its own (auto_map): that is never run" in said


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(folder: Path, trace: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    (folder / "tokenizer.json").unlink()
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", None]},
        tokenizer_class="Evil",
    )
    manager_says(folder)


def test_pickles_are_never_opened(folder: Path, trace: Path) -> None:
    pickled = pickle.dumps(Opens(trace))
    for name in (
        "pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.pkl",
        "model.pt", "adapter_model.bin", "scaler.pt",
    ):  # fmt: skip
        (folder / name).write_bytes(pickled)
    assert worker_says(folder) == manager_says(folder) == ""
    for name in ("tokenizer.model", "spiece.model", "vocab.txt", "merges.txt", "tekken.json"):
        (folder / name).write_bytes(pickled)
        manager_says(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(pickled)
        assert manager_says(folder)
    (folder / SINGLE).unlink()
    assert "pickled weights are never loaded" in worker_says(folder)


# --- names and links -------------------------------------------------------------------------


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same weights under another name, with an index."""
    (folder / SINGLE).rename(folder / "part-1.safetensors")
    keys = list(json.loads(_header(folder / "part-1.safetensors")[0]))
    weight_map = {key: "part-1.safetensors" for key in keys if key != "__metadata__"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def put_into(folder: Path, key: str, file: Any) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map=weight_map | {key: file})


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", ".", "",
        "..\\x.safetensors", "x\0.safetensors", "x\x1b[31m.safetensors", "x\n.safetensors",
        "x" * 10**6 + ".safetensors", "x.bin", "x.safetensors/", 7, None, ["x"], {"a": 1}, NAN,
    ],
    ids=lambda it: repr(it)[:30],
)  # fmt: skip
def test_an_index_names_plain_safetensors_files_of_its_folder_alone(
    file: Any, sharded: Path
) -> None:
    put_into(sharded, KEY, file)
    for said in (worker_says(sharded), manager_says(sharded)):
        assert said.startswith(f"{INDEX} of {sharded.name} puts '{KEY}' into ")


def test_an_index_that_names_a_file_which_is_not_there(sharded: Path) -> None:
    put_into(sharded, KEY, "gone.safetensors")
    assert f"{sharded / 'gone.safetensors'} is missing" in worker_says(sharded)
    assert manager_says(sharded) == ""  # it needs the embeddings alone


def test_an_index_with_a_name_that_moves_the_cursor(sharded: Path) -> None:
    put_into(sharded, "\x1b[2J\n", "part-1.safetensors")
    assert "a name that nobody can read" in worker_says(sharded)


def test_an_index_that_says_a_name_twice(sharded: Path) -> None:
    text = (sharded / INDEX).read_text().rstrip("}")
    (sharded / INDEX).write_text(f'{text}, "{KEY}": "other.safetensors"}}}}')
    assert f"'{KEY}' stands there twice" in worker_says(sharded)


@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_not_followed(file: str, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "another's"
    outside.write_bytes((folder / file).read_bytes() if (folder / file).exists() else b"secret")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(outside)
    said = manager_says(folder)
    assert f"{folder / file} is a link to {outside}, outside of the checkpoint's folder" in said
    assert "secret" not in said


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "loop", "."])
def test_a_link_to_what_is_no_file_is_no_file(target: str, folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE if target == "loop" else target)
    assert "the weights are missing" in worker_says(folder)


def test_a_pipe_is_no_file(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)
    assert "the weights are missing" in worker_says(folder)


def test_links_within_the_folder_and_into_the_hub_cache_are_followed(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / SINGLE).rename(folder / "weights-of-today")
    (folder / SINGLE).symlink_to("weights-of-today")
    assert worker_says(folder) == ""
    snapshot = fill_cache(tmp_path / "cache", whole)
    assert all(it.is_symlink() for it in snapshot.iterdir())
    assert worker_says(snapshot) == manager_says(snapshot) == ""
    # As older releases of huggingface_hub filled a folder of one's own.
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in snapshot.iterdir():
        (linked / path.name).symlink_to(path.resolve())
    assert worker_says(linked) == manager_says(linked) == ""
    # The cache itself may be a link.
    (tmp_path / "moved").symlink_to(tmp_path / "cache")
    moved = tmp_path / "moved" / snapshot.relative_to(tmp_path / "cache")
    assert worker_says(moved) == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert Checkpoint(REPO).folder.name == COMMIT


def test_a_link_in_a_snapshot_that_leaves_the_cache_is_not_followed(
    whole: Path, tmp_path: Path
) -> None:
    snapshot = fill_cache(tmp_path / "cache", whole)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(whole / SINGLE)
    assert "is a link to" in worker_says(snapshot)


# --- safetensors headers ---------------------------------------------------------------------


def _header(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def spoil(folder: Path, key: str, **said: Any) -> None:
    header, data = _header(folder / SINGLE)
    entries = json.loads(header)
    entries[key] = entries.get(key, {}) | said
    write_header(folder / SINGLE, json.dumps(entries).encode(), data)


EMPTY: Final = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
ENTRIES: Final[list[Json]] = [
    *({"shape": it} for it in ([INF, 1], [32.0, 32], ["32", "32"], [True, 1024], [10**300] * 3)),
    *({"shape": it} for it in ([1] * 10**5, [10**4000] * 9, [32, -32], "1024", {"a": 1}, None)),
    {"shape": [0, -1], "data_offsets": [0, 0]},
    {"shape": [0, 2**60], "data_offsets": [0, 0]},
    {"shape": [2**32, 2**32], "data_offsets": [0, 0]},  # 2**64 wraps to nothing elsewhere
    *({"data_offsets": it} for it in ([-4096, 0], [4096, 0], [0, 1, 2], {"a": 0, "b": 9}, "ab")),
    {"data_offsets": [10**30, 10**30 + 4096]},
    *({"dtype": it} for it in ("F4000", "F" * 10**6, None, ["F32"], 32)),
]


@pytest.mark.parametrize("said", ENTRIES, ids=lambda it: str(it)[:50])
def test_an_entry_of_a_header_that_makes_no_sense(said: Json, folder: Path) -> None:
    spoil(folder, KEY, **said)
    for refused in (worker_says(folder), manager_says(folder)):
        assert refused.startswith(f"{folder / SINGLE}: tensor '{KEY}' ")


@pytest.mark.parametrize("by", [0, 4, 4092])
def test_tensors_that_share_bytes(by: int, folder: Path) -> None:
    entries = json.loads(_header(folder / SINGLE)[0])
    start, stop = entries["model.layers.1.self_attn.q_proj.weight"]["data_offsets"]
    spoil(folder, KEY, data_offsets=[start - by, stop - by])
    assert "lie in the same bytes" in worker_says(folder)
    assert "lie in the same bytes" in manager_says(folder)


def test_a_tensor_that_stands_there_twice(folder: Path) -> None:
    header, data = _header(folder / SINGLE)
    entry = json.dumps(json.loads(header)[KEY])
    write_header(folder / SINGLE, header.rstrip()[:-1] + f', "{KEY}": {entry}}}'.encode(), data)
    assert f"'{KEY}' stands there twice" in worker_says(folder)


@pytest.mark.parametrize("name", ["\x1b[2J\n", "x" * 10**6, "\udcff", "a\u2028b"], ids=ascii)
def test_a_tensor_whose_name_cannot_be_said(name: str, folder: Path) -> None:
    spoil(folder, name[:1000], **EMPTY)
    assert "a name that nobody can read or write" in worker_says(folder)


def test_a_layer_number_that_is_no_number(folder: Path) -> None:
    spoil(folder, "model.layers.²².x", **EMPTY)
    spoil(folder, f"model.layers.{'1' * 400}.x", **EMPTY)
    assert worker_says(folder) == manager_says(folder) == ""  # no parameter of the model


@pytest.mark.parametrize("length", [0, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be(length: int, folder: Path) -> None:
    with (folder / SINGLE).open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2 * 10**8)  # a hole
    assert f"{folder / SINGLE} " in worker_says(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": ' + b"[" * 10**6, b'{"a": [' + b"[]," * 10**6 + b"[]]}", b'{"a": 1e999}',
        b"\0" * 99, b'{"a":' * 10**5, b'{"a": ' + b"9" * 10**5 + b"}", b"null",
        '{"a": 1}'.encode("utf-16"),
    ],
    ids=lambda it: repr(it)[:20],
)  # fmt: skip
def test_a_header_that_is_no_list_of_tensors(header: bytes, folder: Path) -> None:
    write_header(folder / SINGLE, header, b"")
    assert f"{folder / SINGLE}" in worker_says(folder)


@pytest.mark.parametrize("is_there", [False, True], ids=["announced", "there, as a hole"])
def test_a_tensor_of_a_terabyte_costs_nothing(is_there: bool, folder: Path) -> None:
    end = (folder / SINGLE).stat().st_size
    for key in (KEY, "model.embed_tokens.weight"):
        entry = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [end, end + 2**40]}
        spoil(folder, key, **entry)
        end += 2**40
    if is_there:
        try:
            os.truncate(folder / SINGLE, end + 2**20)
        except OSError:
            pytest.skip("no file may be so long here")
    assert "has shape [524288, 524288]" in worker_says(folder)
    assert "has shape [524288, 524288]" in manager_says(folder)


@pytest.mark.parametrize(
    "said",
    [
        {"dtype": "F64", "shape": [16, 32]},
        {"dtype": "BF16", "shape": [32, 64]},
        {"shape": [1024]},
        {"shape": [1, 32, 32]},
        {"dtype": "C64", "shape": [32, 16]},
        {"dtype": "I32"},
        {"dtype": "U32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"quantize": "int8"}], ids=["", "int8"])
def test_a_tensor_of_another_shape_or_type_than_the_config_says(
    said: Json, settings: Json, folder: Path
) -> None:
    spoil(folder, KEY, **said)
    refused = worker_says(folder, **settings)
    assert KEY in refused and ("has shape" in refused or "that its config.json does not" in refused)


# --- a copy of a slice -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[1]", "{", '{"version": 1}', '{"version": 1, "layers": [0, 1e999], "files": {}}',
        '{"version": 1, "layers": [0, 1], "name": "x", "fingerprint": "x", "files": {"a": '
        '{"num_bytes": 1, "modified_ns": 1, "ranges": [[0, 1e999]]}}}',
        '{"a": [' + "[]," * 10**6 + "[]]}",
    ],
    ids=lambda it: it[:40],
)  # fmt: skip
def test_a_marker_of_a_slice_that_is_none(text: str, folder: Path) -> None:
    (folder / MARKER).write_text(text)
    assert f"{folder / MARKER} is " in worker_says(folder)


# --- tokenizers ------------------------------------------------------------------------------


def replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


TOKENIZERS: Final[list[Json]] = [
    {"model": None},
    {"model": {"type": "Evil"}},
    {"added_tokens": "x"},
    {"added_tokens": [{"id": -1, "content": "x"}]},
    {"decoder": {"type": "x"}},
    {"normalizer": replace({"String": "a"}, "x" * 10**6)},
    {"normalizer": replace({"Regex": ""}, "x" * 1000)},
    {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replace({"String": "a"}, "a" * 10)] * 12,
        }
    },
    {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    {"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 99)] * 9}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
]


@pytest.mark.parametrize("values", TOKENIZERS, ids=lambda it: str(it)[:60])
def test_a_tokenizer_file_that_makes_no_sense_or_too_much(values: Json, folder: Path) -> None:
    change(folder / "tokenizer.json", **values)
    assert "tokenizer" in manager_says(folder)
    assert worker_says(folder) == ""  # workers read none


def test_a_map_of_characters_cannot_hide(folder: Path) -> None:
    hidden = '{"type": "Precompiled", "\\u0070recompiled_charsmap": "////////"}'
    text = json.dumps(json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": 0})
    (folder / "tokenizer.json").write_text(
        text.replace('"normalizer": 0', f'"normalizer": {hidden}')
    )
    assert "writes plain letters as numbers" in manager_says(folder)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+!x"])
def test_an_expression_that_tries_for_ever_gives_up(pattern: str, folder: Path) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    change(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load_entry(str(folder)).tokenizer
    with pytest.raises(ModelError, match="retry-limit") as refused, foreign("it failed"):
        tokenizer("a" * 60 + "!")
    one_sentence(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": ["x"]},
        {"tokenizer_class": "RagTokenizer"},
        {"model_max_length": "x"},
        {"added_tokens_decoder": {"x": "y"}},
        {"eos_token": 5},
        {"chat_template": 5},
    ],
    ids=str,
)
def test_a_tokenizers_settings_that_make_no_sense(values: Json, folder: Path) -> None:
    """Where transformers overlooks one, it works without."""
    change(folder / "tokenizer_config.json", **values)
    said = manager_says(folder)
    assert said == "" or folder.name in said


def test_a_tokenizer_file_without_end(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 65 * 2**20)
    assert f"{folder / 'tokenizer.json'} has 68157440 bytes" in manager_says(folder)
