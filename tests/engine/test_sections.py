"""How a model is cut, and which workers make up a chain."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis.strategies import floats, integers, lists

from engine.sections import Candidate, Section, check_chain, parse_layers, split_layers
from proto.errors import ModelError, SplitError
from proto.messages import WorkerFacts


def cost_of(section: Section, layer_costs: list[float], head_cost: float) -> float:
    head = head_cost if section.end == len(layer_costs) else 0.0
    return sum(layer_costs[section.start : section.end]) + head


def all_cuts(num_layers: int, num_sections: int) -> list[list[Section]]:
    return [
        [Section(start, end) for start, end in zip((0, *inner), (*inner, num_layers), strict=True)]
        for inner in combinations(range(1, num_layers), num_sections - 1)
    ]


costs = lists(floats(0, 100) | integers(0, 3).map(float), min_size=1, max_size=24)


@given(layer_costs=costs, num_sections=integers(1, 24), head_cost=floats(0, 100))
def test_sections_cover_every_layer_once_and_in_order(
    layer_costs: list[float], num_sections: int, head_cost: float
) -> None:
    assume(num_sections <= len(layer_costs))
    sections = split_layers(layer_costs, num_sections, head_cost)
    covered = [layer for section in sections for layer in range(section.start, section.end)]
    assert covered == list(range(len(layer_costs)))
    assert len(sections) == num_sections and all(section.num_layers for section in sections)


@given(
    layer_costs=lists(integers(0, 20).map(float), min_size=1, max_size=9),
    num_sections=integers(1, 9),
    head_cost=integers(0, 40).map(float),
)
def test_no_cut_has_a_cheaper_largest_section_nor_a_more_even_one_for_the_same_price(
    layer_costs: list[float], num_sections: int, head_cost: float
) -> None:
    assume(num_sections <= len(layer_costs))

    def price(sections: list[Section]) -> tuple[float, int]:
        largest = max(cost_of(section, layer_costs, head_cost) for section in sections)
        return largest, sum(section.num_layers**2 for section in sections)

    sections = split_layers(layer_costs, num_sections, head_cost)
    assert price(sections) == min(map(price, all_cuts(len(layer_costs), num_sections)))


@pytest.mark.parametrize(
    ("num_layers", "num_sections", "head_cost", "expected"),
    [
        (8, 2, 0.0, "0:4 4:8"),
        (8, 3, 0.0, "0:3 3:6 6:8"),
        (10, 4, 0.0, "0:3 3:6 6:8 8:10"),
        (8, 2, 0.2, "0:5 5:8"),
        (8, 2, 5.0, "0:7 7:8"),
        (6, 6, 9.0, "0:1 1:2 2:3 3:4 4:5 5:6"),
        (5, 1, 9.0, "0:5"),
    ],
)
def test_equal_layers_are_spread_evenly_and_the_head_counts(
    num_layers: int, num_sections: int, head_cost: float, expected: str
) -> None:
    sections = split_layers([0.1] * num_layers, num_sections, head_cost)
    assert " ".join(map(str, sections)) == expected


def test_a_model_of_many_layers_is_cut_exactly() -> None:
    sections = split_layers([1.0] * 128, 64, head_cost=1.5)
    # The head takes the place of more than a layer, so one other section holds three.
    assert sections[-1].num_layers == 1
    assert [section.num_layers for section in sections[:2]] == [3, 2]


@pytest.mark.parametrize(
    ("num_layers", "num_sections", "sentence"),
    [
        (4, 5, "cannot split 4 layers over 5 sections: .* pass --sections 4 or fewer"),
        (4, 0, "cannot split over 0 sections: pass --sections 1 or more"),
    ],
)
def test_a_cut_that_is_not_possible_says_both_numbers(
    num_layers: int, num_sections: int, sentence: str
) -> None:
    with pytest.raises(SplitError, match=sentence):
        split_layers([1.0] * num_layers, num_sections)


def test_layers_are_parsed_as_a_half_open_range() -> None:
    assert parse_layers(" 2:8 ", 8) == Section(2, 8)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2-8", "--layers '2-8' is not START:END: write two whole numbers, the end not included"),
        ("-1:8", "--layers '-1:8' is not START:END"),
        ("4:4", "--layers 4:4 holds no layer: the end is not included"),
        ("5:4", "--layers 5:4 holds no layer"),
        ("4:9", "--layers 4:9 goes past the model's end: it has 8 layers, so the end can be 8"),
    ],
)
def test_layers_that_make_no_section_are_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(SplitError) as refused:
        parse_layers(text, 8)
    assert str(refused.value).startswith(sentence)


# --- chains ----------------------------------------------------------------------------------


def worker(
    layers: str,
    *,
    port: int | None = None,
    section: int | None = None,
    num_sections: int | None = None,
    model: str = "tiny",
    model_path: str = "/models/tiny",
    fingerprint: str = "aaaaaaaaaaaaaaaa",
    dtype: str = "float32",
    block_tokens: int = 16,
) -> Candidate:
    start, end = map(int, layers.split(":"))
    port = 7710 + (section if section is not None else start) if port is None else port
    facts = WorkerFacts(
        listen=f"0.0.0.0:{port}",
        host="board",
        pid=1,
        model=model,
        model_path=model_path,
        fingerprint=fingerprint,
        section=section,
        num_sections=num_sections,
        start_layer=start,
        end_layer=end,
        num_layers=12,
        hidden_size=64,
        vocab_size=100,
        max_context=128,
        dtype=dtype,
        device="cpu",
        stage_bytes=1,
        block_tokens=block_tokens,
        block_bytes=1,
        total_blocks=1,
        free_blocks=1,
        max_step_tokens=512,
    )
    return Candidate(f"pi:{port}", facts)


def refusal(*workers: Candidate) -> str:
    with pytest.raises(SplitError) as refused:
        check_chain(workers)
    return str(refused.value)


def test_workers_are_put_in_the_order_of_their_layers() -> None:
    last, first, middle = worker("8:12"), worker("0:3"), worker("3:8")
    chain = check_chain([last, first, middle])
    assert chain.stages == (first, middle, last) and chain.spares == ()


def test_one_worker_with_all_layers_is_a_chain() -> None:
    assert check_chain([worker("0:12")]).stages[0].section == Section(0, 12)


def test_no_worker_at_all_is_no_chain() -> None:
    assert refusal() == ("no worker was given: pass --workers HOST:PORT,HOST:PORT or --spawn N")


def test_a_missing_section_is_named_with_the_command_that_starts_it() -> None:
    assert refusal(
        worker("0:4", section=0, num_sections=3), worker("8:12", section=2, num_sections=3)
    ) == (
        "section 1 of 3, layers 4:8, is missing from the chain (pi:7710 holds 0:4, pi:7712 holds "
        "8:12 of 12 layers): start `worker --sections 3 --index 1 --model /models/tiny`, "
        "and add the address to --workers"
    )


def test_the_demo_model_needs_no_model_option() -> None:
    assert "start `worker --sections 2 --index 0`," in refusal(
        worker("6:12", section=1, num_sections=2, model_path="")
    )


def test_several_missing_sections_are_all_named() -> None:
    sentence = refusal(
        worker("3:6", section=1, num_sections=4), worker("6:9", section=2, num_sections=4)
    )
    assert sentence.startswith("section 0 of 4, layers 0:3, and section 3 of 4, layers 9:12, are")
    assert "--index 0 --model /models/tiny` and `worker --sections 4 --index 3" in sentence


def test_neighbours_that_are_both_missing_are_started_by_their_numbers() -> None:
    sentence = refusal(worker("0:4", section=0, num_sections=3, model_path=""))
    assert sentence.startswith("layers 4:12 are missing")
    assert "`worker --sections 3 --index 1` and `worker --sections 3 --index 2`" in sentence


@pytest.mark.parametrize("num_sections", [None, 2])
def test_a_gap_between_hand_picked_layers_is_named_by_its_layers(num_sections: int | None) -> None:
    sentence = refusal(
        worker("0:4", model_path="", section=num_sections and 0, num_sections=num_sections),
        worker("6:12", model_path=""),
    )
    assert sentence.startswith("layers 4:6 are missing")
    assert "start `worker --layers 4:6`" in sentence


def test_of_two_workers_with_the_same_section_the_first_given_works_and_the_other_is_spare() -> (
    None
):
    second, first, last = worker("0:6", port=2), worker("0:6", port=1), worker("6:12")
    chain = check_chain([second, first, last])
    assert chain.stages == (second, last)
    assert chain.spares == (first,) and chain.others == ()


def test_two_workers_with_the_same_section_do_not_hide_that_one_is_missing() -> None:
    sentence = refusal(worker("0:6", port=1), worker("0:6", port=2))
    assert sentence.startswith("layers 6:12 are missing from the chain (pi:1 holds 0:6 of 12")


def test_of_several_chains_the_one_with_the_smallest_sections_is_taken() -> None:
    whole, first, last = worker("0:12", port=1), worker("0:6", port=2), worker("6:12", port=3)
    large, small = worker("0:9", port=4), worker("9:12", port=5)
    chain = check_chain([whole, large, small, first, last])
    assert chain.stages == (first, last)
    assert chain.spares == () and chain.others == (whole, large, small)


def test_a_worker_that_overlaps_a_whole_chain_is_left_out_of_it() -> None:
    chain = check_chain([worker("0:7", port=1), worker("0:6", port=2), worker("6:12", port=3)])
    assert [stage.address for stage in chain.stages] == ["pi:2", "pi:3"]
    assert [other.address for other in chain.others] == ["pi:1"]


def test_workers_that_overlap_are_both_named_with_their_layers() -> None:
    assert refusal(worker("0:7"), worker("6:12")).startswith(
        "worker pi:7710 (layers 0:7) and worker pi:7716 (layers 6:12) overlap:"
    )


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            worker("6:12", model="big", fingerprint="b" * 16),
            "worker pi:7710 holds the model tiny, worker pi:7716 holds big: "
            "start them all with the same --model",
        ),
        (
            worker("6:12", fingerprint="b" * 16),
            "worker pi:7710 holds the model tiny aaaaaaaa, worker pi:7716 holds tiny bbbbbbbb: "
            "start them all with the same --model",
        ),
        (
            worker("6:12", dtype="bfloat16"),
            "worker pi:7710 computes in float32, worker pi:7716 in bfloat16: "
            "start them all with the same --dtype",
        ),
        (
            worker("6:12", block_tokens=32),
            "worker pi:7710 keeps 16 tokens in a KV block, worker pi:7716 32: "
            "run the same version of comboio on both",
        ),
    ],
    ids=["model", "same name", "dtype", "block"],
)
def test_workers_that_do_not_hold_the_same_model_alike_are_refused(
    other: Candidate, sentence: str
) -> None:
    with pytest.raises(ModelError) as refused:
        check_chain([worker("0:6"), other])
    assert str(refused.value) == sentence
