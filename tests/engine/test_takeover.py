"""Who takes over the layers of lost workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.sections import Section
from engine.takeover import Holder, take_over

ROOMY = 10**9


def holder(text: str, room_bytes: int = ROOMY, **more: bool | float) -> Holder:
    start, _, end = text.partition(":")
    return Holder(section=Section(int(start), int(end)), room_bytes=room_bytes, **more)


def cut(*holders: Holder, layers: int = 12, head_bytes: int = 0) -> list[str] | None:
    sections = take_over(holders, [100] * layers, head_bytes)
    return None if sections is None else [str(it) if it else "-" for it in sections]


def test_a_neighbour_with_room_takes_the_lost_layers_and_the_others_keep_theirs() -> None:
    assert cut(holder("0:2"), holder("6:12")) == ["0:6", "6:12"]
    assert cut(holder("0:4"), holder("8:12", room_bytes=500)) == ["0:7", "7:12"]


def test_a_spare_of_another_section_takes_the_lost_one_as_it_was() -> None:
    assert cut(holder("0:4"), holder("8:12"), holder("8:12")) in (
        ["0:4", "8:12", "4:8"],
        ["0:4", "4:8", "8:12"],
    )


def test_the_lost_layers_are_divided_where_nobody_has_room_for_all() -> None:
    assert cut(holder("0:4", 600), holder("8:12", 600)) == ["0:6", "6:12"]


def test_who_has_no_room_hands_layers_on_to_who_has() -> None:
    assert cut(holder("0:4", 1000), holder("4:8", 400)) == ["0:8", "8:12"]


def test_the_last_one_left_holds_all_layers_if_they_fit() -> None:
    assert cut(holder("4:8", 1300), head_bytes=100) == ["0:12"]
    assert cut(holder("4:8", 1299), head_bytes=100) is None


def test_one_that_serves_others_keeps_its_section() -> None:
    assert cut(holder("0:4", is_fixed=True), holder("8:12")) == ["0:4", "4:12"]
    assert cut(holder("0:4", is_fixed=True), holder("8:12", is_fixed=True)) is None


def test_a_worker_that_quantizes_holds_more_layers_in_the_same_memory() -> None:
    assert cut(holder("0:4", 200, share=0.25), holder("8:12", 400)) == ["0:8", "8:12"]


def test_nobody_is_left() -> None:
    assert cut() is None


@st.composite
def crews(draw: st.DrawFn) -> tuple[list[Holder], list[int], int]:
    layers = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    holders = []
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(layers) - 1))
        end = draw(st.integers(start + 1, len(layers)))
        room, fixed = draw(st.integers(0, 400)), draw(st.booleans())
        holders.append(Holder(section=Section(start, end), room_bytes=room, is_fixed=fixed))
    return holders, layers, draw(st.integers(0, 50))


@given(crews())
def test_what_is_found_covers_every_layer_once_and_fits(crew: object) -> None:
    holders, layers, head_bytes = crew  # type: ignore[misc]
    sections = take_over(holders, layers, head_bytes)
    if sections is None:
        return
    held = sorted(section for section in sections if section is not None)
    assert [layer for it in held for layer in range(it.start, it.end)] == list(range(len(layers)))
    for it, section in zip(holders, sections, strict=True):
        if section not in (None, it.section):
            num_bytes = sum(layers[section.start : section.end])
            assert not it.is_fixed
            assert num_bytes + head_bytes * (section.end == len(layers)) <= it.room_bytes
