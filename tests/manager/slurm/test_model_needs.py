"""How many nodes a model needs, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from manager.plan import make_plan
from manager.slurm.model_needs import (
    HEADROOM,
    Need,
    fit,
    needs,
    nodes_for,
    open_model,
    with_headroom,
)
from manager.slurm.nodes import Node
from proto.errors import ModelError, UsageError
from tests.support.processes import ROOT
from tests.support.tiny_gguf import write_tiny_gguf

GB = 10**9
DEMO = str(ROOT / "engine" / "demo")


@dataclass(frozen=True)
class Even:
    """A model of equal layers."""

    num_layers: int
    layer_bytes: int
    kv_bytes: int = 0
    name: str = "even"
    context: int = 4096

    @property
    def weights_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def largest_section_bytes(self, num_sections: int) -> int:
        layers = ceil(self.num_layers / num_sections)
        return layers * self.layer_bytes + ceil(self.kv_bytes * layers / self.num_layers)


def node(
    name: str, memory_bytes: int = 64 * GB, *, gpus: int = 0, state: str = "IDLE", kind: str = ""
) -> Node:
    return Node(
        name=name,
        state=state,
        partitions=("gpu",),
        cpus=8,
        allocated_cpus=0,
        memory_bytes=memory_bytes,
        allocated_memory_bytes=0,
        os_free_bytes=None,
        gpus=gpus,
        used_gpus=0,
        gpu_types=(kind,) if kind else (),
    )


def three_nodes(**values: object) -> list[Node]:
    return [node(f"node{number}", **values) for number in range(3)]  # type: ignore[arg-type]


def test_the_guides_example_50_gb_over_nodes_of_20_gb():
    need = needs(Even(40, GB, kv_bytes=0), three_nodes(memory_bytes=20 * GB), gpu_bytes=None)
    assert (need.num_sections, need.num_nodes, need.fits_now) == (3, 3, True)
    assert need.section_bytes == with_headroom(14 * GB)


def test_a_section_stays_within_a_place_with_headroom():
    assert fit(Even(10, GB), [12 * GB]) == (1, 12 * GB, True)
    assert fit(Even(10, GB), [12 * GB - 1] * 2) == (2, 6 * GB, True)


@given(
    num_layers=integers(1, 60),
    layer_bytes=integers(1, 10**10),
    kv_bytes=integers(0, 10**10),
    places=lists(integers(1, 10**11), min_size=1, max_size=12),
)
def test_it_takes_as_few_sections_as_fit_and_no_fewer(num_layers, layer_bytes, kv_bytes, places):
    model = Even(num_layers, layer_bytes, kv_bytes)

    def fits(num_sections: int) -> bool:
        needed = with_headroom(model.largest_section_bytes(num_sections))
        return sum(place >= needed for place in places) >= num_sections

    possible = [it for it in range(1, min(num_layers, len(places)) + 1) if fits(it)]
    num_sections, section_bytes, does_fit = fit(model, places)
    assert does_fit == bool(possible)
    if possible:
        assert num_sections == possible[0]
    assert section_bytes == with_headroom(model.largest_section_bytes(num_sections))


def test_nodes_of_different_sizes_count_where_they_are_large_enough():
    nodes = [node("small", 4 * GB), node("large", 64 * GB), node("larger", 90 * GB)]
    need = needs(Even(10, 10 * GB), nodes, gpu_bytes=None)
    assert (need.num_nodes, need.place_bytes, need.idle_nodes) == (2, 64 * GB, 2)


def test_nodes_that_take_no_jobs_do_not_count_and_busy_ones_not_now():
    nodes = [node("a"), node("b", state="ALLOCATED"), node("c", 900 * GB, state="DOWN*")]
    need = needs(Even(10, 10 * GB), nodes, gpu_bytes=None)
    assert (need.num_nodes, need.idle_nodes, need.fits_now) == (2, 1, False)
    with pytest.raises(UsageError, match="no node here takes jobs now"):
        needs(Even(1, GB), [nodes[2]], gpu_bytes=None)


def test_each_gpu_holds_a_section_where_its_memory_is_told():
    nodes = three_nodes(gpus=2, kind="a100_40gb")
    for need in (
        needs(Even(40, 3 * GB), nodes, gpu_bytes=None),
        needs(Even(40, 3 * GB), three_nodes(gpus=2), gpu_bytes=40 * GB),
    ):
        assert (need.place, need.num_sections, need.num_nodes) == ("GPU", 4, 2)
        assert (need.place_bytes, need.idle_nodes, need.fits_now) == (40 * GB, 3, True)
    with pytest.raises(UsageError, match="no node here that takes jobs has a GPU"):
        needs(Even(40, 3 * GB), three_nodes(), gpu_bytes=40 * GB)


def test_what_does_not_fit_is_told_with_the_finest_cut():
    need = needs(Even(2, 100 * GB), three_nodes(), gpu_bytes=None)
    assert (need.num_nodes, need.num_sections, need.place_bytes) == (None, 2, None)
    assert (need.section_bytes, need.largest_place_bytes) == (with_headroom(100 * GB), 64 * GB)
    assert not need.fits_now


def test_the_roomiest_nodes_are_filled_first():
    assert nodes_for(5, [1, 4, 2]) == 2
    assert nodes_for(7, [1, 4, 2]) == 3
    assert nodes_for(8, [1, 4, 2]) is None


def test_a_checkpoint_is_cut_as_the_workers_cut_it():
    model = open_model(DEMO, dtype="float32", context=512)
    plan = make_plan(DEMO, 3, dtype="float32", context=512)
    largest = max(it.weights_bytes + it.kv_bytes for it in plan.sections)
    assert model.largest_section_bytes(3) == largest
    assert (model.name, model.num_layers, model.context) == (plan.model, plan.num_layers, 512)
    assert model.weights_bytes == plan.weights_bytes
    assert model.kv_bytes == sum(it.kv_bytes for it in plan.sections)
    need = needs(model, three_nodes(memory_bytes=ceil(largest * (1 + HEADROOM))), gpu_bytes=None)
    assert isinstance(need, Need) and need.num_nodes == 3


def test_a_gguf_file_is_spread_by_whole_layers(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", num_layers=4, context=256)
    model = open_model(str(path), dtype="auto", context=100)
    assert (model.num_layers, model.context) == (4, 100)
    whole = model.weights_bytes + model.kv_bytes
    assert model.largest_section_bytes(1) == whole
    assert model.largest_section_bytes(2) == ceil(whole / 2)
    assert model.largest_section_bytes(3) == ceil(whole / 2)  # one of them has two layers


def test_a_model_that_there_is_not_is_the_callers_mistake(tmp_path):
    with pytest.raises(ModelError):
        open_model(str(tmp_path / "none.gguf"), dtype="auto", context=None)
