"""Packed weights are kept on a disk: used again, never trusted, never in the way."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import packed_cache
from engine.packed_cache import PackedCache
from engine.stage import Stage
from engine.stage_loading import load_stage
from engine.staging import Staged, Staging
from tests.support.local_chain import Chain, open_entry
from tests.support.memory import ROOT
from tests.support.models import VOCAB, save_tiny
from tests.support.small_disk import why_no_small_disk, with_small_disk

IDS = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("qwen3_moe", tmp_path / "model", hidden_size=64)
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache")


def load(folder: Path, cache: PackedCache | None, quantize: str = "int8") -> Stage:
    return load_stage(
        str(folder), sections=1, index=0, dtype="float32", device="cpu", quantize=quantize,
        cache=cache,
    )  # fmt: skip


def logits(folder: Path, stage: Stage) -> Tensor:
    return Chain(open_entry(folder), [stage]).prefill(IDS)


def kept(cache: PackedCache) -> list[Path]:
    return sorted(cache.folder.glob("*"))


# --- used again --------------------------------------------------------------------------------


def test_the_second_start_reads_packed_bytes_alone(folder: Path, cache: PackedCache) -> None:
    """All that it reads of the checkpoint are norms and routers."""
    first = load(folder, cache)
    assert len(kept(cache)) == 5  # four layers and the head
    second = load(folder, cache)
    assert first.packed.fetched_bytes == 0
    assert second.packed.fetched_bytes == first.packed.packed_bytes
    small = sum(it.numel() * 4 for it in second._model.parameters() if not it.is_meta)
    assert second.read_bytes <= small < 0.05 * first.read_bytes
    assert second.stage_bytes == first.stage_bytes
    assert torch.equal(logits(folder, second), logits(folder, first))


def test_another_cut_of_the_model_uses_the_same_files(folder: Path, cache: PackedCache) -> None:
    load(folder, cache)
    before = kept(cache)
    stage = load_stage(
        str(folder), layers=(1, 3), dtype="float32", device="cpu", quantize="int8", cache=cache
    )
    assert stage.packed.fetched_bytes == stage.packed.packed_bytes > 0
    assert kept(cache) == before


def test_other_formats_and_other_weights_have_files_of_their_own(
    folder: Path, cache: PackedCache, tmp_path: Path
) -> None:
    first = logits(folder, load(folder, cache))
    load(folder, cache, "int4")
    assert len(kept(cache)) == 9  # their heads are both int8
    # The same names, sizes and times: only the numbers differ.
    weights = folder / "model.safetensors"
    seen = weights.stat()
    model = save_tiny("qwen3_moe", tmp_path / "other", hidden_size=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    os.utime(weights, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    other = load(folder, cache)
    assert other.packed.fetched_bytes == 0
    assert not torch.allclose(logits(folder, other), first, atol=1e-3)


def test_16_bit_weights_are_not_kept(folder: Path, cache: PackedCache) -> None:
    load_stage(
        str(folder), layers=(0, 4), dtype="bfloat16", device="cpu", quantize="none", cache=cache
    )
    assert not cache.folder.exists()


# --- never trusted -----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "longer", "a bit", "zeros", "empty", "another file"])
def test_a_damaged_file_is_made_anew(
    damage: str, folder: Path, cache: PackedCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(folder, load(folder, cache))
    path, other = sorted(kept(cache), key=lambda it: it.stat().st_size)[-2:]  # two layers
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:half],
            "longer": whole + b"\0",
            "a bit": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
            "zeros": whole[:half] + bytes(len(whole) - half),
            "empty": b"",
            "another file": other.read_bytes(),
        }[damage]
    )
    stage = load(folder, cache)
    assert 0 < stage.packed.fetched_bytes < stage.packed.packed_bytes
    assert torch.equal(logits(folder, stage), expected)
    assert path.read_bytes() == whole
    if damage in ("a bit", "zeros", "another file"):
        assert "cannot be used, and are made anew" in caplog.text


def test_an_unfinished_file_is_no_file(folder: Path, cache: PackedCache) -> None:
    """Of a worker that was killed; it goes when the cache makes room an hour later."""
    cache.folder.mkdir()
    left = cache.folder / f"abc.1{packed_cache._UNFINISHED}"
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    load(folder, cache)
    assert not left.exists()
    assert len(kept(cache)) == 5


def test_what_another_user_made_is_not_used(
    folder: Path, cache: PackedCache, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a folder to another user")
    load(folder, cache)
    os.chown(cache.folder, 12345, 12345)
    assert load(folder, cache).packed.fetched_bytes == 0
    assert "another user's" in caplog.text


# --- never in the way --------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_a_line_in_the_log(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    stage = load(folder, PackedCache(tmp_path / "file" / "cache"))
    assert stage.packed.fetched_bytes == 0
    assert "quantized weights are not kept" in caplog.text


def test_the_least_recently_used_goes_first(
    folder: Path, cache: PackedCache, tmp_path: Path
) -> None:
    load(folder, cache)
    own = {it: it.stat().st_size for it in kept(cache)}
    limit = int(sum(own.values()) * 1.4)
    old, older = cache.folder / "old.packed", cache.folder / "older.packed"
    for path, used_s in ((older, 1e9), (old, 2e9 - 1e9 + 5)):
        path.write_bytes(bytes(limit // 10))
        os.utime(path, (used_s, used_s))
    next(iter(own)).unlink()
    load(folder, PackedCache(cache.folder, limit))  # its own files are used now
    assert set(own) <= set(kept(cache))
    for path in own:
        os.utime(path, (1e9 + 1, 1e9 + 1))
    used = list(own)[-1]
    os.utime(used)
    load(folder, PackedCache(cache.folder, limit), "int4")
    assert not older.exists()
    assert sum(it.stat().st_size for it in kept(cache)) <= limit
    assert used in kept(cache)


def test_a_stage_that_is_larger_than_the_cache_displaces_nothing(
    folder: Path, cache: PackedCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.mkdir()
    other = cache.folder / "other.packed"
    other.write_bytes(bytes(100))
    load(folder, PackedCache(cache.folder, 1000))
    assert kept(cache) == [other]
    assert "no room" in caplog.text


LOAD = """
import json, logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stderr)
from pathlib import Path
from engine.packed_cache import PackedCache
from engine.stage_loading import load_stage
stage = load_stage(sys.argv[1], layers=(0, 4), dtype="float32", device="cpu", quantize="int8",
                   cache=PackedCache(Path(sys.argv[2])))
print(json.dumps([stage.stage_bytes, sorted(it.name for it in Path(sys.argv[2]).iterdir())]))
"""


@pytest.mark.skipif(bool(why_no_small_disk()), reason=str(why_no_small_disk()))
def test_a_full_disk_is_a_line_in_the_log(folder: Path, cache: PackedCache) -> None:
    cache.folder.mkdir()
    done = with_small_disk(
        "64k",
        cache.folder,
        [sys.executable, "-c", LOAD, str(folder), str(cache.folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == []
    assert "quantized weights are not kept" in done.stderr


class _Watch:
    """What the staging said."""

    def __init__(self) -> None:
        self.done: list[Staged] = []

    def waiting(self, folder: Path) -> None: ...

    def copying(self, done_bytes: int, total_bytes: int) -> None: ...

    def staged(self, done: Staged) -> None:
        self.done.append(done)


def test_what_is_kept_is_not_copied_to_the_staging_folder(
    folder: Path, cache: PackedCache, tmp_path: Path
) -> None:
    copied = []
    for name in ("first", "second"):
        watch = _Watch()
        stage = load_stage(
            str(folder), sections=1, index=0, dtype="float32", device="cpu", quantize="int8",
            cache=cache, staging=Staging(tmp_path / name, watch),
        )  # fmt: skip
        copied.append(watch.done[0].copied_bytes)
    assert stage.packed.fetched_bytes == stage.packed.packed_bytes
    assert copied[1] < 0.3 * copied[0]  # headers, norms, and the files beside the weights


def test_progress_counts_what_is_read_of_both(folder: Path, cache: PackedCache) -> None:
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        load_stage(
            str(folder), layers=(0, 4), dtype="float32", device="cpu", quantize="int8",
            cache=cache, progress=lambda *it, seen=seen: seen.append(it),
        )  # fmt: skip
        assert len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1]
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
