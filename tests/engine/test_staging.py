"""Copies of a slice on a node's own disk: whole or not used, and never a hole taken for weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.attention import StageRun
from engine.checkpoint import Checkpoint
from engine.copying import copy_ranges, look_at
from engine.entry import load_entry
from engine.stage import Stage
from engine.stage_loading import load_stage
from engine.staged_copy import MARKER, CopiedFile, Range, merged, read_marker
from engine.staging import Staged, Staging
from proto.errors import Error, ModelError, UsageError
from tests.support.hub import REPO, fill_cache
from tests.support.local_chain import Chain, cut
from tests.support.models import VOCAB, save_tiny
from tests.support.processes import ROOT, clean_environment
from tests.support.small_disk import why_no_small_disk, with_small_disk

PROMPT: list[int] = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SECTIONS = [(0, 1), (1, 3), (3, 4)]


class Told:
    """Hears how staging goes; `on_copying` and `on_waiting` may interfere."""

    def __init__(
        self,
        on_copying: Callable[[int, int], None] = lambda _done, _total: None,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_copying, self._on_waiting = on_copying, on_waiting
        self.progress: list[tuple[int, int]] = []
        self.done: list[Staged] = []

    def waiting(self, folder: Path) -> None:
        self._on_waiting()

    def copying(self, done_bytes: int, total_bytes: int) -> None:
        self.progress.append((done_bytes, total_bytes))
        self._on_copying(done_bytes, total_bytes)

    def staged(self, done: Staged) -> None:
        self.done.append(done)

    @property
    def copied_bytes(self) -> int:
        return sum(it.copied_bytes for it in self.done)


def load(model: Path, layers: Range, root: Path, told: Told | None = None) -> Stage:
    staging = Staging(root, told or Told())
    return load_stage(str(model), layers=layers, dtype="float32", device="cpu", staging=staging)


def load_plainly(model: Path, layers: Range) -> Stage:
    return load_stage(str(model), layers=layers, dtype="float32", device="cpu")


def outputs(stage: Stage) -> Tensor:
    """What the stage makes of some hidden states."""
    count = len(PROMPT)
    hidden = torch.randn(count, stage.hidden_size, generator=torch.Generator().manual_seed(5))
    run = StageRun(start=0, num_tokens=count, rope_length=count, blocks=torch.arange(4))
    out = stage.forward(torch.tensor(PROMPT), hidden, [run], stage.new_cache(4))
    return stage.logits(out) if stage.is_last else out


def copies_in(root: Path) -> list[Path]:
    return sorted(it for it in root.glob("*/layers-*") if it.is_dir())


def fill_holes(copy: Path) -> int:
    """Make every byte that was not copied a part of a NaN; returns how many."""
    marker = read_marker(copy)
    assert marker is not None
    filled = 0
    for name, it in marker.files.items():
        whole = (copy / name).read_bytes()
        data = bytearray(b"\xff" * it.num_bytes)
        for start, stop in it.ranges:
            data[start:stop] = whole[start:stop]
        filled += it.num_bytes - sum(stop - start for start, stop in it.ranges)
        (copy / name).write_bytes(data)
    return filled


def spoil_tensors(folder: Path) -> None:
    """Overwrite all weights, so that sizes and times tell nothing of it."""
    for path in folder.glob("*.safetensors"):
        data, times = path.read_bytes(), path.stat()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama in a folder, in one file."""
    save_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Llama in a folder, a file for each tensor or so."""
    save_tiny("llama", tmp_path / "sharded", max_shard_size="1KB")
    return tmp_path / "sharded"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What --stage-to names."""
    return tmp_path / "disk"


# --- the same results, and no byte too many ----------------------------------------------------


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt2", "gemma2", "qwen2", "mixtral", "gpt_oss", "deepseek_v3", "gemma4", "opt"],
)
def test_a_stage_that_was_staged_computes_the_same_and_has_read_no_hole(
    kind: str, shards: str, tmp_path: Path, root: Path
) -> None:
    """The original is gone and every hole full of NaN when the copies are loaded once more."""
    model = tmp_path / "model"
    save_tiny(kind, model, max_shard_size=shards)
    chain = cut(model, SECTIONS)
    expected = chain.prefill(PROMPT, chunk_tokens=25)
    read_bytes = [it.read_bytes for it in chain.stages]

    staged = [load(model, layers, root) for layers in SECTIONS]
    model.rename(tmp_path / "gone")
    copies = copies_in(root)
    assert sum(map(fill_holes, copies)) > 0
    again = [load_plainly(*both) for both in zip(copies, SECTIONS, strict=True)]
    for stages in (staged, again):
        assert torch.equal(Chain(chain.entry, stages).prefill(PROMPT, chunk_tokens=25), expected)
        assert {it.fingerprint for it in stages} == {chain.entry.fingerprint}
        assert [it.read_bytes for it in stages] == read_bytes
    assert {it.model_name for it in staged} == {"model"}


@pytest.mark.parametrize("shards", ["5GB", "1MB"])
def test_a_copy_has_the_originals_files_and_takes_the_room_of_its_slice(
    shards: str, tmp_path: Path, root: Path
) -> None:
    model, told = tmp_path / "model", Told()
    save_tiny("llama", model, max_shard_size=shards, hidden_size=256, intermediate_size=512)
    (model / "picture.bin").write_bytes(bytes(1000))
    stage = load(model, (1, 2), root, told)
    (copy,) = copies_in(root)
    assert Checkpoint(str(copy)).fingerprint == Checkpoint(str(model)).fingerprint
    beside = 0
    for path in copy.iterdir():
        if path.name == MARKER:
            continue
        original = (model / path.name).read_bytes()
        is_weights = path.suffix == ".safetensors"
        header = 8 + int.from_bytes(original[:8], "little") if is_weights else len(original)
        assert path.stat().st_size == len(original)
        assert path.read_bytes()[:header] == original[:header]
        beside += header
    assert {"config.json", "generation_config.json"} < {it.name for it in copy.iterdir()}
    assert not (copy / "picture.bin").exists()
    total = stage.read_bytes + beside
    assert told.copied_bytes == total
    assert (told.progress[0], told.progress[-1]) == ((0, total), (total, total))
    on_disk = sum(it.stat().st_blocks * 512 for it in copy.iterdir())
    whole = sum(it.stat().st_size for it in model.iterdir())
    assert stage.read_bytes <= on_disk < stage.read_bytes + 200_000 < whole / 2
    assert copy.stat().st_mode & 0o777 == 0o700  # not everybody may read the original


def test_where_a_disk_has_no_holes_but_zeros_nothing_changes(model: Path, root: Path) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    data = (copy / SINGLE).read_bytes()
    with (copy / SINGLE).open("r+b") as file:
        file.write(data)
    told = Told()
    assert torch.equal(
        outputs(load(model, (1, 3), root, told)), outputs(load_plainly(model, (1, 3)))
    )
    assert told.copied_bytes == 0


def test_copies_of_several_sections_lie_side_by_side(model: Path, root: Path) -> None:
    for layers in SECTIONS:
        load(model, layers, root)
    above = f"model-{Checkpoint(str(model)).fingerprint[:12]}"
    assert [str(it.relative_to(root)) for it in copies_in(root)] == [
        f"{above}/layers-{first}-{end}" for first, end in SECTIONS
    ]


# huggingface_hub reads its environment when it is imported, so each load is a process.
LOAD = """
import json, os, signal, sys
from pathlib import Path
from engine.stage_loading import load_stage
from engine.staging import Staging
from proto.errors import Error
model, layers, root, then = sys.argv[1:]
class Told:
    copied = 0
    def waiting(self, folder):
        pass
    def copying(self, done, total):
        if then == "kill" and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if then == "fill":
            with open(Path(root) / "filler", "ab", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
    def staged(self, done):
        self.copied = done.copied_bytes
told = Told()
start, end = map(int, layers.split(":"))
try:
    stage = load_stage(model, layers=(start, end), dtype="float32", device="cpu",
                       staging=Staging(Path(root), told))
except Error as error:
    print(json.dumps({"error": str(error), "code": error.exit_code,
                      "left": sorted(str(it) for it in Path(root).glob("*/*/*"))}))
else:
    print(json.dumps({"name": stage.model_name, "read": stage.read_bytes, "copied": told.copied}))
"""


def loader(model: Path | str, layers: str, root: Path, then: str = "") -> list[str]:
    """The command line of a process that loads a staged stage."""
    return [sys.executable, "-c", LOAD, str(model), layers, str(root), then]


def in_a_process(command: list[str], **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return said_by(done)


def said_by(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_the_checkpoint_of_a_hub_id_is_staged_out_of_the_cache(
    sharded: Path, root: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "home" / "hub"
    files: dict[str, str] = json.loads((sharded / INDEX).read_text())["weight_map"]
    own = {file for key, file in files.items() if key.startswith("model.layers.2.")}
    fill_cache(cache, sharded, ["config.json", INDEX, *own])
    said = in_a_process(loader(REPO, "2:3", root), HF_HOME=str(cache.parent))
    (copy,) = copies_in(root)
    assert copy.parent.name.startswith("somebody--tiny-")
    assert {it.name for it in copy.glob("*.safetensors")} == own
    assert said["name"] == REPO
    assert said["copied"] > said["read"] > 0
    assert in_a_process(loader(REPO, "2:3", root), HF_HOME=str(cache.parent))["copied"] == 0


# --- used again, or made anew ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gemma4"])
def test_a_copy_that_is_there_is_read_instead_of_the_original(
    kind: str, tmp_path: Path, root: Path
) -> None:
    model, first, again = tmp_path / "model", Told(), Told()
    save_tiny(kind, model, max_shard_size="30KB")
    load(model, (2, 4), root, first)
    expected = outputs(load_plainly(model, (2, 4)))
    spoil_tensors(model)
    assert torch.equal(outputs(load(model, (2, 4), root, again)), expected)
    assert first.copied_bytes > 0
    assert again.copied_bytes == 0
    assert again.progress == []
    assert [it.slice_bytes for it in again.done] == [it.slice_bytes for it in first.done]


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
def test_a_model_that_was_trained_further_is_copied_anew(
    shards: str, tmp_path: Path, root: Path
) -> None:
    """Its config and its index, and so its fingerprint, are those of before."""
    model, told = tmp_path / "model", Told()
    save_tiny("llama", model, max_shard_size=shards)
    before, fingerprint = outputs(load(model, (1, 3), root)), Checkpoint(str(model)).fingerprint
    for path in model.glob("*.safetensors"):
        save_file({key: it * 1.5 for key, it in load_file(path).items()}, path, {"format": "pt"})
    after = outputs(load(model, (1, 3), root, told))
    assert Checkpoint(str(model)).fingerprint == fingerprint
    assert told.copied_bytes > 0
    assert not torch.equal(after, before)
    assert torch.equal(after, outputs(load_plainly(model, (1, 3))))


def remove_a_file(copy: Path) -> None:
    sorted(copy.glob("*.safetensors"))[0].unlink()


def cut_a_file_short(copy: Path) -> None:
    os.truncate(sorted(copy.glob("*.safetensors"))[0], 100)


def remove_the_marker(copy: Path) -> None:
    (copy / MARKER).unlink()


def damage_the_marker(copy: Path) -> None:
    os.truncate(copy / MARKER, (copy / MARKER).stat().st_size // 2)


def remove_all_but_the_marker(copy: Path) -> None:
    for path in copy.iterdir():
        if path.name != MARKER:
            path.unlink()


@pytest.mark.parametrize(
    "harm",
    [
        remove_a_file,
        cut_a_file_short,
        remove_the_marker,
        damage_the_marker,
        remove_all_but_the_marker,
    ],
)
def test_a_copy_that_somebody_cleaned_up_is_mended(
    harm: Callable[[Path], None], sharded: Path, root: Path
) -> None:
    expected, told = outputs(load(sharded, (1, 3), root)), Told()
    (copy,) = copies_in(root)
    harm(copy)
    assert torch.equal(outputs(load(sharded, (1, 3), root, told)), expected)
    assert 0 < told.copied_bytes <= told.done[0].slice_bytes
    assert (told.copied_bytes < told.done[0].slice_bytes) == harm.__name__.endswith(
        ("a_file", "short")
    )


def test_a_copy_that_was_killed_halfway_goes_on_with_what_is_missing(
    sharded: Path, root: Path
) -> None:
    killed = subprocess.run(
        loader(sharded, "1:3", root, "kill"),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (copy,) = copies_in(root)
    with pytest.raises(ModelError, match=r"is a copy of layers 1:3 of sharded, without tensor"):
        load_plainly(copy, (1, 3))
    told = Told()
    expected = outputs(load_plainly(sharded, (1, 3)))
    assert torch.equal(outputs(load(sharded, (1, 3), root, told)), expected)
    assert 0 < told.copied_bytes < 0.6 * told.done[0].slice_bytes


def test_a_worker_that_gives_up_while_copying_leaves_nothing_that_counts_as_whole(
    model: Path, root: Path
) -> None:
    class GivenUp(Error):
        pass

    def give_up(done_bytes: int, _total: int) -> None:
        if done_bytes:
            raise GivenUp

    with pytest.raises(GivenUp):
        load(model, (1, 3), root, Told(give_up))
    told = Told()
    load(model, (1, 3), root, told)
    assert told.copied_bytes > 0


def test_a_second_worker_with_the_same_slice_waits_and_copies_nothing(
    model: Path, root: Path
) -> None:
    is_waiting, copied = threading.Event(), threading.Event()

    def hold(_done: int, _total: int) -> None:
        copied.set()
        assert is_waiting.wait(60)

    keys = [key for key in Checkpoint(str(model)) if "layers.1." in key]
    first, second = Told(on_copying=hold), Told(on_waiting=is_waiting.set)

    def stage(told: Told) -> None:
        checkpoint = Checkpoint(str(model))
        with Staging(root, told).copy_of(checkpoint, keys, (1, 2)):
            assert all(torch.isfinite(checkpoint.read(key)).all() for key in keys)

    threads = [threading.Thread(target=stage, args=[told]) for told in (first, second)]
    threads[0].start()
    assert copied.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert [len(it.done) for it in (first, second)] == [1, 1]
    assert first.copied_bytes > 0
    assert second.copied_bytes == 0


# --- what a copy is not ------------------------------------------------------------------------


def test_other_layers_than_its_own_are_not_loaded_from_a_copy(model: Path, root: Path) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    with pytest.raises(ModelError) as caught:
        load_plainly(copy, (0, 2))
    assert f"{copy} is a copy of layers 1:3 of model, without tensor 'model.layers.0." in str(
        caught.value
    )
    assert str(caught.value).endswith("point --model at the whole checkpoint")


def test_the_manager_does_not_take_holes_for_embeddings(model: Path, root: Path) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    with pytest.raises(ModelError, match=r"without tensor 'model\.embed_tokens\.weight'"):
        load_entry(str(copy), dtype="float32")


def test_a_copy_can_be_staged_once_more_but_has_no_more_than_it_has(
    model: Path, root: Path, tmp_path: Path
) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    expected = outputs(load_plainly(model, (2, 3)))
    assert torch.equal(outputs(load(copy, (2, 3), tmp_path / "other")), expected)
    with pytest.raises(ModelError, match="is a copy of layers 1:3"):
        load(copy, (0, 1), tmp_path / "other")


def test_a_copy_whose_marker_is_damaged_is_no_model(model: Path, root: Path) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    damage_the_marker(copy)
    with pytest.raises(ModelError, match="is damaged: delete") as caught:
        load_plainly(copy, (1, 3))
    assert str(copy / MARKER) in str(caught.value)


# --- what can go wrong -------------------------------------------------------------------------


def rewrite_a_shard(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def replace_a_shard(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[-1]
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def cut_a_shard(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 1)


def edit_the_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))


@pytest.mark.parametrize("done_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("change", [rewrite_a_shard, replace_a_shard, cut_a_shard, edit_the_config])
def test_a_model_that_changes_while_it_is_copied_is_refused_and_no_copy_stays(
    change: Callable[[Path], None], done_share: float, sharded: Path, root: Path
) -> None:
    pending = [change]

    def interfere(done_bytes: int, total_bytes: int) -> None:
        if pending and done_bytes >= done_share * total_bytes:
            pending.pop()(sharded)

    with pytest.raises(ModelError) as caught:
        load(sharded, (0, 4), root, Told(interfere))
    assert "changed while it was copied to" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert copies_in(root) == []


def test_a_model_that_is_cut_off_is_named_as_without_staging(model: Path, root: Path) -> None:
    os.truncate(model / SINGLE, (model / SINGLE).stat().st_size - 100)
    with pytest.raises(ModelError, match=r"is truncated: tensor '.*' needs bytes") as staged:
        load(model, (3, 4), root)
    assert str(model / SINGLE) in str(staged.value)
    assert copies_in(root) == []


def test_a_file_system_that_gives_an_error_is_named_with_the_file(tmp_path: Path) -> None:
    """Another process's memory cannot be read from its first byte; Linux calls that EIO."""
    bad = Path("/proc/self/mem")
    with pytest.raises(ModelError, match="/proc/self/mem cannot be read: Input/output error"):
        copy_ranges(bad, tmp_path / "target", look_at(bad), [(0, 10)], lambda _: None)


def test_a_copy_that_is_deleted_while_it_is_read_is_named(model: Path, root: Path) -> None:
    checkpoint = Checkpoint(str(model))
    keys = ["model.layers.1.mlp.up_proj.weight"]
    with Staging(root, Told()).copy_of(checkpoint, keys, (1, 2)):
        (copy,) = copies_in(root)
        shutil.rmtree(copy)
        with pytest.raises(ModelError, match="cannot be read: No such file") as caught:
            checkpoint.read(keys[0])
    assert str(copy / SINGLE) in str(caught.value)
    assert checkpoint.read(keys[0]).isfinite().all()  # from the original again


def test_a_folder_that_cannot_be_had_is_refused_in_one_sentence(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for root, words in [
        (tmp_path / "file", "is a file: name a folder"),
        (tmp_path / "file" / "below", "cannot be written"),
        (Path("/sys/comboio"), "cannot be written"),
    ]:
        with pytest.raises(UsageError) as caught:
            load(model, (1, 3), root)
        assert str(caught.value).startswith("--stage-to")
        assert str(root) in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user: needs root")
def test_a_copy_that_another_user_made_is_not_trusted(model: Path, root: Path) -> None:
    load(model, (1, 3), root)
    (copy,) = copies_in(root)
    os.chown(copy.parent, 12345, 12345)
    with pytest.raises(UsageError, match="was made by another user, and is not trusted"):
        load(model, (1, 3), root)


def test_too_little_room_is_seen_before_a_byte_is_copied(model: Path, root: Path) -> None:
    if reason := why_no_small_disk():
        pytest.skip(reason)
    root.mkdir()
    command = loader(model, "0:4", root)
    done = with_small_disk("64k", root, command, clean_environment({"PYTHONPATH": str(ROOT)}))
    said = said_by(done)
    assert said["code"] == 2
    start = f"--stage-to {root}: layers 0:4 of model need 0.2 MB there, and 0.1 MB are free: "
    assert said["error"] == f"{start}make room, or name a folder on another disk"
    assert "model.safetensors" not in "".join(said["left"])


def test_a_disk_that_becomes_full_while_copying_keeps_nothing(model: Path, root: Path) -> None:
    if reason := why_no_small_disk():
        pytest.skip(reason)
    root.mkdir()
    command = loader(model, "0:4", root, "fill")
    done = with_small_disk("400k", root, command, clean_environment({"PYTHONPATH": str(ROOT)}))
    said = said_by(done)
    assert said["code"] == 1
    assert f"--stage-to {root} became full while layers 0:4 of model" in said["error"]
    assert said["left"] == []


# --- bytes -------------------------------------------------------------------------------------

ranges = some.lists(
    some.tuples(some.integers(0, 900), some.integers(0, 100)).map(lambda it: (it[0], sum(it))),
    max_size=8,
)


@given(ranges=ranges)
def test_merged_ranges_hold_the_same_bytes_ascending_and_apart(ranges: list[Range]) -> None:
    joined = merged(ranges)
    assert {at for it in joined for at in range(*it)} == {at for it in ranges for at in range(*it)}
    assert all(stop < start for (_, stop), (start, _) in pairwise(joined))
    assert all(CopiedFile(1000, 0, joined).holds(*it) for it in ranges)


@given(ranges=ranges, data=some.binary(min_size=1000, max_size=1000))
def test_exactly_the_ranges_are_copied(
    ranges: list[Range], data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    source, target = folder / "source", folder / "target"
    source.write_bytes(data)
    counted: list[int] = []
    copy_ranges(source, target, look_at(source), ranges, counted.append)
    expected = bytearray(len(data))
    for start, stop in ranges:
        expected[start:stop] = data[start:stop]
    assert target.read_bytes() == expected
    assert sum(counted) == sum(stop - start for start, stop in ranges)
