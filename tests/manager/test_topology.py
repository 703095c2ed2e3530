"""Addresses, and who can reach whom."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from manager.addresses import is_loopback, neighbours, parse_addresses
from manager.pipeline import wanted_blocks
from manager.topology import check_reachability, open_chain
from proto.address import Address, parse_address
from proto.errors import UsageError, WorkerUnreachable
from proto.messages import WorkerFacts

FACTS = WorkerFacts(
    listen="127.0.0.1:7710",
    host="board",
    pid=1,
    model="tiny",
    model_path="",
    fingerprint="f",
    section=0,
    num_sections=1,
    start_layer=0,
    end_layer=4,
    num_layers=4,
    hidden_size=8,
    vocab_size=16,
    max_context=1000,
    dtype="float32",
    device="cpu",
    stage_bytes=1,
    block_tokens=16,
    block_bytes=1,
    total_blocks=100,
    free_blocks=80,
    max_step_tokens=512,
)


def test_addresses_come_one_by_one_or_with_commas():
    expected = (Address("a", 1), Address("b", 2), Address("::1", 3))
    assert parse_addresses(["a:1,b:2", "[::1]:3"]) == expected
    assert parse_addresses([" a:1 , b:2,", "[::1]:3"]) == expected


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["a:0"], ["a:1,a:1"], ["a:99999"], ["::1:7"]])
def test_what_is_no_list_of_addresses_is_refused(texts):
    with pytest.raises(UsageError):
        parse_addresses(texts)


def test_neighbours_listen_on_the_ports_that_follow():
    assert [str(it) for it in neighbours(Address("h", 7710), 3)] == ["h:7710", "h:7711", "h:7712"]


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("192.168.1.2:1", False),
        ("board-1:1", False),
    ],
)
def test_only_loopback_addresses_are_this_machines_alone(text, local):
    assert is_loopback(parse_address(text)) is local


async def test_a_loopback_worker_behind_another_machine_cannot_be_reached():
    other, ours = Address("192.0.2.7", 7710), Address("127.0.0.1", 7711)
    with pytest.raises(UsageError, match=r"192\.0\.2\.7:7710 cannot reach .* 127\.0\.0\.1:7711"):
        await check_reachability([other, ours])
    await check_reachability([ours, other])
    await check_reachability([ours, Address("127.0.0.1", 7712)])


async def test_without_addresses_the_sentence_says_what_to_start(monkeypatch):
    monkeypatch.setattr("manager.topology.DEFAULT_FIRST", Address("127.0.0.1", 9))
    with pytest.raises(WorkerUnreachable, match=r"worker --sections 2 --index 0.*--spawn 2"):
        await open_chain(None)


def test_a_lease_asks_for_what_the_requests_need():
    assert wanted_blocks([FACTS], max_sequences=4, tokens_each=100) == (7, 28)


def test_no_more_is_asked_for_than_the_smallest_worker_has():
    small = replace(FACTS, total_blocks=5, free_blocks=5)
    assert wanted_blocks([FACTS, small], max_sequences=4, tokens_each=100) == (5, 5)


def test_who_does_not_know_leaves_half_to_others():
    assert wanted_blocks([FACTS], max_sequences=16, tokens_each=None) == (1, 63)
    roomy = replace(FACTS, total_blocks=10_000, free_blocks=9_000)
    assert wanted_blocks([roomy], max_sequences=16, tokens_each=None) == (1, 1008)
