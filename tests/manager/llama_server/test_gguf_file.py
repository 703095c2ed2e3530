"""A model is looked at before anything starts: what it is, whether it is whole, whether it fits."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from manager.llama_server.gguf_file import BLOCKS, read_model
from manager.llama_server.memory import check_memory, context_of, memory_need
from proto.errors import ModelError, UsageError
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def whole(tmp_path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", context=512)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_header_says_what_the_model_is(whole):
    model = read_model(whole)
    assert (model.architecture, model.name) == ("llama", "tiny 0")
    assert (model.num_layers, model.context_length) == (4, 512)
    assert model.file_bytes == whole.stat().st_size
    assert 0.9 * model.file_bytes < model.weight_bytes < model.file_bytes
    # 2 key-value heads of 16 values, keys and values, 2 bytes each, in 4 layers
    assert model.kv_bytes_per_token == 2 * 16 * 2 * 2 * 4


def test_sizes_of_tensor_types_are_those_of_the_gguf_package():
    # Q8_1 never leaves memory, and the package counts it differently than ggml does.
    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: BLOCKS.get(kind) for kind in theirs if kind != 9} == {
        kind: sizes for kind, sizes in theirs.items() if kind != 9
    }


@pytest.mark.parametrize("left", [4, 7, 20, 500, 8000, 100_000, -1])
def test_a_file_that_is_cut_short_is_told_wherever_it_was_cut(whole, tmp_path, left):
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[:left])
    sentence = refused(cut)
    assert f"{cut} is cut short: it " in sentence
    assert sentence.endswith("Copy or download it again.")


def test_what_is_no_gguf_is_told(tmp_path):
    def written(content: bytes) -> Path:
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        return path

    assert "there is no such file" in refused(tmp_path / "no.gguf")
    assert "is empty" in refused(written(b""))
    assert "is not a GGUF file (it begins with b'PK\\x03\\x04')" in refused(written(b"PK\3\4aaaa"))
    assert "is only a pointer of Git LFS" in refused(written(b"version https://git-lfs"))
    assert "of a format from before GGUF" in refused(written(b"tjgg\1\0\0\0"))
    assert "is GGUF version 9; known are 2 and 3" in refused(
        written(b"GGUF" + struct.pack("<I", 9))
    )
    huge = struct.pack("<IQQ", 3, 2**60, 1)
    assert "is damaged: it announces 1152921504606846976" in refused(written(b"GGUF" + huge))


def test_a_folder_is_told_with_what_is_meant(whole, tmp_path):
    assert refused(tmp_path).endswith(f"is a folder: name {whole}.")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    assert "convert_hf_to_gguf.py makes a .gguf file of such a checkpoint" in refused(checkpoint)


def test_a_split_model_is_one_and_needs_all_its_parts(whole, tmp_path):
    parts = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        part.write_bytes(whole.read_bytes())
    model = read_model(parts[0])
    assert model.parts == tuple(parts)
    assert model.file_bytes == 3 * whole.stat().st_size
    assert refused(parts[1]).endswith(f"is not the first part of its model: name {parts[0]}.")
    parts[2].write_bytes(whole.read_bytes()[:-1])
    assert f"{parts[2]} is cut short" in refused(parts[0])
    parts[1].unlink()
    assert "has 3 parts and 1 of them are missing, the first is m-00002-of-00003" in refused(
        parts[0]
    )


def test_a_file_of_the_other_byte_order_is_read(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(3)
    writer.add_tensor("a", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_model(path).num_layers == 3


def test_memory_that_is_there_is_enough_and_less_is_told_with_the_numbers(whole):
    model = read_model(whole)
    need = memory_need(model, context=context_of(model, None), parallel=2)
    assert need.kv_bytes == 512 * 2 * model.kv_bytes_per_token
    check_memory(model, need, {"this machine": need.total_bytes})
    with pytest.raises(
        UsageError, match=r"needs about .* and 0\.0 MB are free on this machine: us"
    ):
        check_memory(model, need, {"this machine": 1})
    nodes = {"n1": need.total_bytes // 2, "n2": need.total_bytes}
    check_memory(model, need, nodes, (1, 2))
    with pytest.raises(UsageError, match=r"the part of n1 is .* by tensor_split"):
        check_memory(model, need, nodes, (2, 1))
    with pytest.raises(UsageError, match="are free on the 2 nodes"):
        check_memory(model, need, {"n1": 1, "n2": 1})
