"""What an open link does, the same over TCP and in memory, on both event loops."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proto.errors import (
    LocalProtocolError,
    PeerLost,
    RemoteProtocolError,
    StepFailed,
    UsageError,
    WorkerLost,
    WorkerUnreachable,
)
from proto.framing import MIB, PAYLOAD_ALIGNMENT
from proto.link import LinkSettings, connect
from proto.messages import Leased, Refused, Role, Status, StatusRequest, Step, StepDone
from tests.proto.wire_examples import EXAMPLES, LEASE, STEP, STEP_PAYLOAD, WELCOME

STATUS = EXAMPLES[Status].message


def closing(link) -> asyncio.Future[Exception | None]:
    """What `on_closed` is called with; a second call is an error."""
    closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    link.on_closed = closed.set_result
    return closed


async def soon(awaitable):
    """A deadline against a test that hangs, far beyond what is waited for."""
    return await asyncio.wait_for(awaitable, 20)


# --- frames ----------------------------------------------------------------------------------


async def test_both_ends_know_what_the_other_said_of_itself(link_pair):
    opener, listener = await link_pair(role=Role.OBSERVER)
    assert opener.welcome == WELCOME
    assert listener.hello.role is Role.OBSERVER
    assert opener.is_open
    assert listener.is_open


async def test_frames_arrive_in_order_both_ways(link_pair):
    opener, listener = await link_pair()
    for epoch in range(20):
        opener.send(STEP, STEP_PAYLOAD[:28], STEP_PAYLOAD[28:], epoch=epoch)
        listener.send(Leased(lease=LEASE, blocks=epoch), epoch=epoch)
    for epoch in range(20):
        step, leased = await soon(listener.receive()), await soon(opener.receive())
        assert (step.message, step.epoch, step.payload) == (STEP, epoch, STEP_PAYLOAD)
        assert (leased.message.blocks, leased.epoch) == (epoch, epoch)


async def test_a_payload_of_many_megabytes_arrives_whole_and_aligned(link_pair):
    opener, listener = await link_pair()
    payload = bytearray(range(256)) * (8 * MIB // 256)
    num_bytes = opener.send(STEP, memoryview(payload))
    await soon(opener.drain())
    frame = await soon(listener.receive())
    assert frame.payload == payload
    assert (len(frame.payload.obj) - len(frame.payload)) % PAYLOAD_ALIGNMENT == 0
    assert num_bytes > len(payload)
    assert listener.received_bytes >= num_bytes
    assert opener.sent_bytes >= num_bytes


async def test_on_frame_gets_what_waited_first_and_then_what_comes(link_pair):
    opener, listener = await link_pair()
    opener.send(StatusRequest(), epoch=0)
    await soon(opener.ping())  # the answer comes behind it: the frame is there
    seen, third = [], asyncio.Event()

    def on_frame(frame):
        seen.append(frame.epoch)
        if frame.epoch == 2:
            third.set()

    listener.on_frame = on_frame
    assert seen == [0]
    opener.send(StatusRequest(), epoch=1)
    opener.send(StatusRequest(), epoch=2)
    await soon(third.wait())
    assert seen == [0, 1, 2]


async def test_an_answer_can_be_sent_from_inside_on_frame(link_pair):
    opener, listener = await link_pair()
    listener.on_frame = lambda frame: listener.send(STATUS, epoch=frame.epoch)
    opener.send(StatusRequest(), epoch=7)
    assert (await soon(opener.receive())).epoch == 7


async def test_a_message_that_the_role_may_not_send_is_refused_here_and_the_link_goes_on(link_pair):
    opener, listener = await link_pair(role=Role.OBSERVER)
    with pytest.raises(LocalProtocolError, match=r"may not send Step.*for a observer"):
        opener.send(STEP, STEP_PAYLOAD)
    opener.send(StatusRequest())
    assert (await soon(listener.receive())).message == StatusRequest()


# --- backpressure ----------------------------------------------------------------------------


async def test_a_reader_that_takes_nothing_makes_the_sender_wait_and_loses_nothing(link_pair):
    opener, listener = await link_pair(settings=LinkSettings(max_queued_frames=2))
    payload = memoryview(bytearray(MIB))
    for epoch in range(40):
        opener.send(STEP, payload, epoch=epoch)
    drained = asyncio.ensure_future(opener.drain())
    for epoch in range(40):
        assert opener.unsent_bytes < 41 * MIB
        assert (await soon(listener.receive())).epoch == epoch
    await soon(drained)


async def test_a_link_that_rests_delivers_nothing_until_it_resumes(link_pair):
    opener, listener = await link_pair()
    got, last = [], asyncio.Event()

    def on_frame(frame):
        got.append(frame.epoch)
        if frame.epoch == 31:
            last.set()

    listener.on_frame = on_frame
    listener.pause_reading()
    listener.pause_reading()
    for epoch in range(32):
        opener.send(STEP, bytes(MIB), epoch=epoch)
    drained = asyncio.ensure_future(opener.drain())
    # Whatever the kernel's buffers hold, 32 MiB are more: the opener is still waiting.
    for _ in range(200):
        await asyncio.sleep(0)
    assert got == []
    assert not drained.done()
    listener.resume_reading()
    await soon(last.wait())
    assert got == list(range(32))
    await soon(drained)


async def test_a_peer_that_does_not_read_is_cut_at_the_limit(link_pair):
    opener, listener = await link_pair(settings=LinkSettings(max_unsent_bytes=16 * MIB))
    closed = closing(opener)
    listener.pause_reading()

    def send_a_hundred():
        for _ in range(100):
            opener.send(STEP, bytes(MIB))

    with pytest.raises(WorkerLost, match=r"it does not read: \d+ bytes wait to be sent"):
        send_a_hundred()
    assert not opener.is_open
    assert isinstance(await soon(closed), WorkerLost)
    with pytest.raises(WorkerLost, match="does not read"):
        opener.send(StatusRequest())


async def test_a_peer_that_has_not_read_for_too_long_is_cut(link_pair):
    opener, listener = await link_pair(
        settings=LinkSettings(heartbeat_s=0.02, stalled_s=0.1),
        listener_settings=LinkSettings(heartbeat_s=0.02, stalled_s=100),
    )
    closed = closing(opener)
    listener.pause_reading()
    opener.send(STEP, bytes(32 * MIB))
    waiting = asyncio.ensure_future(opener.drain())
    assert "it has not read for 0.1 s" in str(await soon(closed))
    await soon(waiting)


# --- heartbeats ------------------------------------------------------------------------------


async def test_pings_are_answered_without_the_owner(link_pair):
    opener, listener = await link_pair()
    assert await soon(opener.ping()) > 0
    assert await soon(listener.ping()) > 0
    assert opener.rtt_s is not None
    assert opener.clock_offset_s is not None
    assert abs(opener.clock_offset_s) < 10  # one clock


async def test_a_refusal_on_an_open_link_is_an_answer_like_any_other(link_pair):
    opener, listener = await link_pair()
    listener.send(Refused(reason="3 of 8 blocks are free"))
    assert (await soon(opener.receive())).message.reason == "3 of 8 blocks are free"
    assert opener.is_open


async def test_heartbeats_never_reach_the_owner(link_pair):
    opener, listener = await link_pair()
    await soon(opener.ping())
    opener.send(StatusRequest())
    assert (await soon(listener.receive())).message == StatusRequest()


# --- the end ---------------------------------------------------------------------------------


async def test_goodbye_reaches_the_other_end_with_its_reason(link_pair):
    opener, listener = await link_pair()
    here, there = closing(opener), closing(listener)
    await soon(opener.close("finished"))
    assert await soon(here) is None
    assert await soon(there) is None
    assert listener.goodbye == "finished"
    assert not listener.is_open
    with pytest.raises(PeerLost, match="said goodbye: finished"):
        listener.send(STATUS)
    with pytest.raises(WorkerLost, match="this side closed the link"):
        opener.send(StatusRequest())


async def test_what_was_sent_before_goodbye_still_arrives(link_pair):
    opener, listener = await link_pair()
    opener.send(STEP, bytes(8 * MIB))
    await soon(opener.close())
    assert len((await soon(listener.receive())).payload) == 8 * MIB
    with pytest.raises(PeerLost, match="said goodbye"):
        await listener.receive()


async def test_both_ends_may_say_goodbye_at_the_same_time(link_pair):
    opener, listener = await link_pair()
    here, there = closing(opener), closing(listener)
    await soon(asyncio.gather(opener.close("a"), listener.close("b")))
    assert (await here, await there) == (None, None)


async def test_closing_twice_is_closing_once(link_pair):
    opener, _ = await link_pair()
    closed = closing(opener)
    await soon(asyncio.gather(opener.close(), opener.close()))
    opener.close_soon()
    opener.fail(RemoteProtocolError("late"))
    assert await closed is None


async def test_on_closed_is_told_even_when_it_is_set_too_late(link_pair):
    opener, _ = await link_pair()
    await soon(opener.close())
    assert await soon(closing(opener)) is None


async def test_a_connection_that_breaks_is_a_lost_peer_named_by_address(link_pair):
    opener, listener = await link_pair()
    here, there = closing(opener), closing(listener)
    listener.abort("pulled the plug")
    error = await soon(here)
    assert isinstance(error, WorkerLost)
    assert error.worker == opener.peer
    assert f"worker {opener.peer} was lost" in str(error)
    assert "pulled the plug" in str(await soon(there))


async def test_who_waits_for_a_frame_hears_of_the_end(link_pair):
    opener, listener = await link_pair()
    waiting = asyncio.ensure_future(opener.receive())
    await asyncio.sleep(0)
    listener.close_soon("shutting down")
    with pytest.raises(WorkerLost, match="shutting down"):
        await soon(waiting)


async def test_who_waits_for_a_pong_hears_of_the_end(link_pair):
    opener, listener = await link_pair()
    listener.pause_reading()
    waiting = asyncio.ensure_future(opener.ping())
    await asyncio.sleep(0)
    opener.close_soon()
    with pytest.raises(WorkerLost):
        await soon(waiting)


async def test_iteration_ends_with_goodbye_and_raises_what_broke(link_pair):
    opener, listener = await link_pair()
    for epoch in range(3):
        opener.send(StatusRequest(), epoch=epoch)
    opener.close_soon()
    assert [frame.epoch async for frame in listener] == [0, 1, 2]
    opener, listener = await link_pair()
    opener.abort("gone")
    with pytest.raises(PeerLost):
        async for _ in listener:
            pass


async def test_an_answer_that_does_not_come_in_time_closes_the_link(link_pair):
    opener, listener = await link_pair()
    there = closing(listener)
    with pytest.raises(WorkerLost, match=r"no answer within 0.01 s"):
        await opener.receive(timeout_s=0.01)
    assert not opener.is_open
    assert await soon(there) is None
    assert "no answer within" in listener.goodbye


async def test_a_protocol_error_of_the_owner_closes_the_link_and_is_told_to_both(link_pair):
    opener, listener = await link_pair()
    here, there = closing(opener), closing(listener)

    def on_frame(frame):
        raise RemoteProtocolError("step 5 carries too little")

    listener.on_frame = on_frame
    opener.send(STEP, STEP_PAYLOAD)
    assert str(await soon(there)) == f"{listener.peer}: step 5 carries too little"
    assert await soon(here) is None
    assert "step 5 carries too little" in opener.goodbye


async def test_a_bug_of_the_owner_closes_the_link_and_is_reported(link_pair):
    opener, listener = await link_pair()
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    here, there = closing(opener), closing(listener)

    def on_frame(frame):
        raise ZeroDivisionError("a secret of ours")

    listener.on_frame = on_frame
    opener.send(StatusRequest())
    assert isinstance(await soon(there), ZeroDivisionError)
    assert await soon(here) is None
    assert opener.goodbye == "an internal error"
    assert [type(context["exception"]) for context in reported] == [ZeroDivisionError]


async def test_fail_tells_the_peer_why(link_pair):
    opener, listener = await link_pair()
    there = closing(listener)
    listener.fail(StepFailed("the cache is gone"))
    await soon(opener.wait_closed())
    assert opener.goodbye == "the cache is gone"
    assert isinstance(await soon(there), StepFailed)


async def test_frames_that_come_after_the_end_are_not_delivered(link_pair):
    opener, listener = await link_pair()
    seen = []

    def on_frame(frame):
        seen.append(frame.epoch)
        listener.close_soon("enough")

    listener.on_frame = on_frame
    for epoch in range(5):
        opener.send(StatusRequest(), epoch=epoch)
    await soon(opener.wait_closed())
    assert seen == [0]


@pytest.mark.parametrize("field", ["heartbeat_s", "max_queued_frames", "stalled_s"])
def test_settings_of_a_link_are_above_zero(field):
    with pytest.raises(UsageError, match=f"{field} is 0"):
        LinkSettings(**{field: 0})


def test_steps_and_their_answers_are_the_only_messages_with_a_payload():
    assert [kind for kind in EXAMPLES if kind.HAS_PAYLOAD] == [Step, StepDone]


async def test_a_call_is_given_up_even_in_the_moment_in_which_it_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        given_up = 0
        for num_turns in range(20):
            call = asyncio.create_task(connect(address, role=Role.OBSERVER, agent="test"))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            if call.cancel():
                given_up += 1
                with pytest.raises(asyncio.CancelledError):
                    await call
            else:
                assert isinstance(call.exception(), WorkerUnreachable)
        assert 0 < given_up < 20
