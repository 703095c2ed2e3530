"""tensor x data against the ranks that there are, and which layers divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from engine.jobs.axonn_grid import AXES, Grid, Parallelism, make_grid
from proto.errors import UsageError


def test_data_parallelism_follows_from_the_ranks():
    grid = make_grid(Parallelism(tensor=2), 8, "mpirun")
    assert (grid.tensor, grid.data, grid.axis) == (2, 4, "depth")
    assert grid.sentence == "tensor 2 by depth x data 4"


@given(tensor=integers(1, 16), data=integers(1, 16), axis=sampled_from(AXES))
def test_the_tensor_part_lies_on_one_axis(tensor, data, axis):
    grid = make_grid(Parallelism(tensor=tensor, data=data, axis=axis), tensor * data, "srun")
    assert grid.rows * grid.columns * grid.depth == tensor
    assert grid.num_ranks == tensor * data


def test_another_product_than_the_ranks_is_refused_with_the_numbers():
    with pytest.raises(UsageError) as refused:
        make_grid(Parallelism(tensor=2, data=4), 4, "srun")
    assert str(refused.value) == (
        "--tensor-parallelism 2 x --data-parallelism 4 takes 8 ranks, and 4 ranks were started by "
        "srun: start 8, or pass two numbers whose product is 4."
    )


def test_a_tensor_part_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(UsageError, match="3 does not divide the ranks: 8 ranks were started"):
        make_grid(Parallelism(tensor=3), 8, "mpirun")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tensor": 0}, "--tensor-parallelism 0 must be 1 or more"),
        ({"data": -1}, "--data-parallelism -1 must be 1 or more"),
        ({"axis": "width"}, "'width' is none of row, column, depth"),
    ],
)
def test_what_makes_no_sense_is_refused(values, words):
    with pytest.raises(UsageError, match=words):
        Parallelism(**values)


def test_a_layer_divides_by_outputs_by_inputs_or_by_its_storage():
    sizes = {"num_inputs": 6, "num_outputs": 9}
    divides = {axis: Grid(tensor=2, data=1, axis=axis).divides(**sizes) for axis in AXES}
    assert divides == {"row": False, "column": True, "depth": True}
    assert not Grid(tensor=4, data=1, axis="depth").divides(**sizes)
