"""What a worker says of itself and of steps, before a manager believes or shows it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from manager.links import open_link
from manager.worker_words import check_facts, checked
from proto.address import parse_address
from proto.errors import RemoteProtocolError, WorkerRefused
from proto.framing import Frame
from proto.link import Link, listen
from proto.messages import Fault, Leased, LinkLost, Refused, SectionHeld, Status, StepDone
from tests.proto.wire_examples import EXAMPLES, WELCOME

FACTS = WELCOME.worker
HERE = "board:7710"
ID = bytes(16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_tokens": 0}, "(block_tokens 0)"),
        ({"max_step_tokens": 0}, "(max_step_tokens 0)"),
        ({"vocab_size": 0}, "(vocab_size 0)"),
        ({"start_layer": 3, "end_layer": 3}, "(layers 3:3 of"),
        ({"start_layer": 0, "end_layer": 2**31 - 1, "num_layers": 4}, "(layers 0:2147483647 of 4)"),
        ({"host": "a\x1b[2J"}, r"(host 'a\x1b[2J')"),
        ({"model": "a\nb"}, r"(model 'a\nb')"),
    ],
)
def test_facts_that_cannot_be_are_refused_by_name(changes, words) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        check_facts(replace(FACTS, **changes), HERE)
    assert str(refused.value).startswith(f"worker {HERE} says of itself what cannot be {words}")
    with pytest.raises(RemoteProtocolError):
        checked(SectionHeld(worker=replace(FACTS, **changes)), HERE)


def test_facts_of_a_worker_are_taken() -> None:
    check_facts(FACTS, HERE)


async def test_a_manager_does_not_stay_with_a_worker_that_cannot_be() -> None:
    odd = replace(WELCOME, worker=replace(FACTS, block_tokens=0))
    said: list[object] = []
    listener = await listen(
        "127.0.0.1:0", welcome=lambda hello: odd, on_link=lambda link: said.append(link)
    )
    with pytest.raises(RemoteProtocolError, match=r"worker 127.0.0.1:\d+ says .*block_tokens 0"):
        await open_link(parse_address(listener.address))
    await listener.close()


@pytest.mark.parametrize("blocks", [0, 1, 9, 2**31 - 1])
async def test_a_lease_of_other_than_was_asked_for_is_refused(blocks) -> None:
    def serve(link: Link) -> None:
        def answer(_frame: Frame) -> None:
            link.send(Leased(lease=ID, blocks=blocks))

        link.on_frame = answer

    listener = await listen("127.0.0.1:0", welcome=lambda hello: WELCOME, on_link=serve)
    link = await open_link(parse_address(listener.address))
    with pytest.raises(WorkerRefused, match=f"leased {blocks} KV blocks, where 2 to 8 were asked"):
        await link.lease(ID, min_blocks=2, want_blocks=8, trace=False)
    await link.close()
    await listener.close()


def test_reasons_are_shown_on_one_line() -> None:
    done = EXAMPLES[StepDone].message
    fault = Fault(sequence=1, worker="w\x1b[1m", reason="no\nroom")
    shown = checked(replace(done, faults=[fault]), HERE)
    assert shown == replace(done, faults=[Fault(sequence=1, worker="w [1m", reason="no room")])
    lost = LinkLost(lease=bytes(16), next="a\tb", reason="gone\r\n")
    assert checked(lost, HERE) == LinkLost(lease=bytes(16), next="a b", reason="gone  ")
    assert checked(Refused(reason="\x07no"), HERE) == Refused(reason=" no")
    status = EXAMPLES[Status].message
    assert checked(status, HERE) is status
