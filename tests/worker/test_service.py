"""What a worker answers to managers, neighbours and observers; real processes, real links."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from proto.errors import PeerLost, WorkerRefused
from proto.messages import (
    MAX_STAGES,
    Goodbye,
    Lease,
    Leased,
    LinkLost,
    Refused,
    Release,
    Role,
    Route,
    Routed,
    Sampling,
    Status,
    StatusRequest,
    StepReport,
)
from tests.support.processes import ROOT, WorkerProcess, clean_environment
from tests.support.wire import DEADLINE_S, Chain, Part, closed, open_link, pack, take_lease, told

Make = Callable[..., Part]


async def status_of(worker: WorkerProcess) -> Status:
    link = await open_link(worker.address, Role.OBSERVER)
    link.send(StatusRequest())
    status = await told(link, Status)
    await link.close()
    return status


async def test_two_workers_draw_the_greedy_tokens_of_the_whole_model(
    first: WorkerProcess, last: WorkerProcess, model: LlamaForCausalLM, part: Make
) -> None:
    prompts = {1: [3, 17, 42, 99, 5], 2: [8, 8, 127]}
    tables = {1: [0, 1], 2: [2, 3]}
    texts = {sequence: list(prompt) for sequence, prompt in prompts.items()}
    chain = await Chain.open([first.address, last.address])
    start = dict.fromkeys(prompts, 0)
    for _ in range(6):
        done = await chain.step(
            *(part(s, texts[s][start[s] :], start[s], blocks=tables[s]) for s in texts)
        )
        assert not done.faults
        assert len(done.compute_s) == 2
        for drawn in done.drawn:
            start[drawn.sequence] = len(texts[drawn.sequence])
            texts[drawn.sequence].append(drawn.token)
    await chain.close()
    for sequence, prompt in prompts.items():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert texts[sequence] == expected[0].tolist()


async def test_a_run_that_draws_nothing_has_no_token_and_feeds_the_next_chunk(
    first: WorkerProcess, last: WorkerProcess, model: LlamaForCausalLM, part: Make
) -> None:
    prompt = list(range(40, 70))
    chain = await Chain.open([first.address, last.address])
    begun = await chain.step(part(1, prompt[:20], sampling=None))
    done = await chain.step(part(1, prompt[20:], 20))
    await chain.close()
    assert not begun.drawn and not begun.faults
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)
    assert done.drawn[0].token == expected[0, -1]


async def test_sampling_parameters_reach_the_last_worker(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address])
    hot = Sampling(seed=5, temperature=2.0, logprobs=3, repetition_penalty=1.5, num_history=2)
    draws = [
        (await chain.step(part(1, [1, 2, 3], sampling=hot, history=[1, 2]))).drawn[0]
        for _ in range(2)
    ]
    await chain.close()
    assert draws[0] == draws[1]
    assert draws[0].logprob is not None and len(draws[0].top) == 3


async def test_a_traced_lease_reports_every_step_of_every_worker_in_order_of_time(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address], trace=True)
    number = chain.send(part(1, [1, 2, 3]))
    report = await told(chain.links[0], StepReport)
    await chain.close()
    assert (report.step, report.num_tokens) == (number, 3)
    times = [report.received_s, report.started_s, report.finished_s, report.sent_s]
    assert times == sorted(times)


# --- leases ----------------------------------------------------------------------------------


async def test_two_managers_share_the_blocks_and_cannot_take_each_others(
    first: WorkerProcess,
) -> None:
    one, two = await open_link(first.address), await open_link(first.address)
    assert one.welcome is not None
    total = one.welcome.worker.total_blocks
    half = (await take_lease(one, total // 2)).blocks
    rest = (await take_lease(two, 1, total)).blocks
    assert (half, rest) == (total // 2, total - total // 2)
    two.send(Lease(lease=os.urandom(16), min_blocks=3, want_blocks=5))
    refusal = (await told(two, Refused)).reason
    assert refusal.startswith("3 KV blocks (48 tokens) are needed, 0 of")
    assert "--kv-memory" in refusal
    await one.close()  # without a Release: closing is enough
    two.send(Lease(lease=os.urandom(16), min_blocks=1, want_blocks=total))
    assert (await told(two, Leased)).blocks == half
    await two.close()
    assert (await status_of(first)).free_blocks == total


async def test_a_released_lease_is_free_again_and_a_second_release_does_no_harm(
    first: WorkerProcess,
) -> None:
    link = await open_link(first.address)
    assert link.welcome is not None
    leased = await take_lease(link, link.welcome.worker.total_blocks)
    for _ in range(2):
        link.send(Release(lease=leased.lease))
    link.send(StatusRequest())
    status = await told(link, Status)
    await link.close()
    assert (status.free_blocks, status.leases) == (status.total_blocks, 0)


async def test_a_lease_of_an_id_that_is_taken_is_refused(first: WorkerProcess) -> None:
    one, two = await open_link(first.address), await open_link(first.address)
    leased = await take_lease(one)
    two.send(Lease(lease=leased.lease, min_blocks=1, want_blocks=1))
    assert "is open already" in (await told(two, Refused)).reason
    await one.close()
    await two.close()


async def test_another_managers_lease_counts_as_unknown(first: WorkerProcess) -> None:
    one, two = await open_link(first.address), await open_link(first.address)
    leased = await take_lease(one)
    two.send(Release(lease=leased.lease))
    two.send(Route(lease=leased.lease, next=None), epoch=1)
    await closed(two)
    assert two.goodbye is not None and "is not open on this link" in two.goodbye
    assert (await status_of(first)).leases == 1
    await one.close()


async def test_a_manager_that_vanishes_frees_its_blocks(first: WorkerProcess) -> None:
    link = await open_link(first.address)
    await take_lease(link, 5)
    link.abort("gone")
    status = await status_of(first)
    while status.leases:  # until the worker's kernel has told it
        status = await status_of(first)
    assert status.free_blocks == status.total_blocks


MANAGER = """
import asyncio, os, sys
from proto.link import connect
from proto.messages import Lease, Role
async def main():
    link = await connect(sys.argv[1], role=Role.MANAGER, agent="test")
    link.send(Lease(lease=os.urandom(16), min_blocks=5, want_blocks=5, trace=False))
    print((await link.receive(60)).message.blocks, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def manager(first: WorkerProcess) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leases five blocks."""
    with subprocess.Popen(
        [sys.executable, "-c", MANAGER, first.address],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=clean_environment(),
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 5
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "falls silent"])
async def test_a_manager_that_dies_or_falls_silent_frees_its_blocks(
    first: WorkerProcess, manager: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    assert (await status_of(first)).leases == 1
    manager.send_signal(number)
    status = await status_of(first)
    while status.leases:
        status = await status_of(first)
    assert status.free_blocks == status.total_blocks


async def test_one_bad_run_is_a_fault_and_the_rest_of_the_step_goes_on(
    first: WorkerProcess, last: WorkerProcess, model: LlamaForCausalLM, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address], blocks=4)
    done = await chain.step(
        part(1, [1, 2], blocks=[4]),  # the lease has 0 to 3
        part(2, [5, 6, 7], blocks=[1]),
        part(3, [1] * 20, blocks=[2]),  # needs two blocks
        Part(sequence=4, start=0, tokens=[200], hidden=torch.zeros(1, 32), blocks=[3]),
        part(5, [1], start=512, blocks=[0] * 33),
    )
    await chain.close()
    reasons = {fault.sequence: fault.reason for fault in done.faults}
    assert reasons == {
        1: "the block table names blocks 4 to 4, the lease has 4",
        3: "1 blocks of 16 tokens do not hold position 20",
        4: "a token id is outside the vocabulary of 128",
        5: "position 513 is beyond the model's context of 512",
    }
    assert {fault.worker for fault in done.faults} == {first.address}
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)
    assert [(drawn.sequence, drawn.token) for drawn in done.drawn] == [(2, expected[0, -1])]


# --- the chain -------------------------------------------------------------------------------


async def test_a_middle_worker_cannot_be_the_last_and_the_last_has_no_next(
    first: WorkerProcess, last: WorkerProcess
) -> None:
    for worker, following, words in (
        (first, None, "cannot be the last of a chain"),
        (last, first.address, "nothing can follow it"),
    ):
        link = await open_link(worker.address)
        leased = await take_lease(link)
        link.send(Route(lease=leased.lease, next=following), epoch=1)
        reason = (await told(link, Refused)).reason
        assert words in reason and worker.address in reason
        await link.close()


async def test_a_next_worker_that_is_not_there_is_named(first: WorkerProcess) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        link = await open_link(first.address)
        leased = await take_lease(link)
        link.send(Route(lease=leased.lease, next=address), epoch=3)
        frame = await link.receive(DEADLINE_S)
        await link.close()
    assert isinstance(frame.message, LinkLost)
    assert (frame.epoch, frame.message.next) == (3, address)
    assert address in frame.message.reason


@pytest.mark.parametrize("address", ["..:7710", "a\0b:7710", "x" * 64 + ":7710", "\x1b[2J", "x"])
async def test_an_address_that_is_none_is_told_and_the_lease_can_be_routed_anew(
    first: WorkerProcess, last: WorkerProcess, address: str, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address])
    chain.links[0].send(Route(lease=chain.lease, next=address), epoch=2)
    assert (await told(chain.links[0], LinkLost)).next == address
    chain.epoch = 3
    await chain.route([first.address, last.address])
    assert (await chain.step(part(1, [1, 2, 3]))).drawn
    await chain.close()


async def test_a_step_that_cannot_be_handed_on_ends_the_link_to_the_next_and_nothing_else(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address])
    step, tables, hidden = pack(chain.lease, 1, [part(1, [1, 2])])
    overlong = replace(step, compute_s=[0.0] * MAX_STAGES)  # and one more, of the first worker
    chain.links[0].send(overlong, tables, hidden, epoch=chain.epoch)
    assert "compute_s" in (await told(chain.links[0], LinkLost)).reason
    chain.epoch = 2
    await chain.route([first.address, last.address])
    assert (await chain.step(part(1, [1, 2, 3]))).drawn
    await chain.close()


async def test_a_next_worker_that_does_not_follow_is_refused(first: WorkerProcess) -> None:
    link = await open_link(first.address)
    leased = await take_lease(link)
    link.send(Route(lease=leased.lease, next=first.address), epoch=1)
    reason = (await told(link, LinkLost)).reason
    await link.close()
    assert "layers 0:2" in reason and "do not follow" in reason


async def test_a_next_worker_without_the_lease_refuses_the_neighbour(
    first: WorkerProcess, last: WorkerProcess
) -> None:
    link = await open_link(first.address)
    leased = await take_lease(link)
    link.send(Route(lease=leased.lease, next=last.address), epoch=1)
    reason = (await told(link, LinkLost)).reason
    await link.close()
    assert last.address in reason and f"knows no lease {leased.lease.hex()[:8]}" in reason
    with pytest.raises(WorkerRefused, match="knows no lease"):
        await open_link(last.address, Role.NEIGHBOUR, lease=os.urandom(16))


async def test_steps_of_an_older_epoch_are_dropped_and_a_newer_one_is_out_of_order(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    addresses = [first.address, last.address]
    chain = await Chain.open(addresses, epoch=4)
    chain.epoch = 5
    await chain.route(addresses)
    chain.send(part(1, [1, 2]), epoch=4)
    done = await chain.step(part(2, [1, 2]))  # the old one did not come before it
    assert [drawn.sequence for drawn in done.drawn] == [2]
    chain.send(part(1, [1, 2]), epoch=6)
    await closed(chain.links[0])
    assert "of epoch 6 came before" in (chain.links[0].goodbye or "")
    await chain.close()


async def test_a_route_of_an_older_epoch_is_refused(last: WorkerProcess) -> None:
    link = await open_link(last.address)
    leased = await take_lease(link)
    for epoch in (2, 1):
        link.send(Route(lease=leased.lease, next=None), epoch=epoch)
    await told(link, Routed)
    assert "epoch 1 came after one of epoch 2" in (await told(link, Refused)).reason
    await link.close()


async def test_a_killed_neighbour_is_told_to_the_manager_and_the_lease_can_be_routed_anew(
    first: WorkerProcess,
    last: WorkerProcess,
    start: Callable[..., WorkerProcess],
    part: Make,
) -> None:
    doomed = start(1)
    chain = await Chain.open([first.address, doomed.address])
    await chain.step(part(1, [1, 2]))
    doomed.kill()
    lost = await told(chain.links[0], LinkLost)
    assert lost.next == doomed.address and doomed.address in lost.reason
    chain.send(part(1, [3], 2))  # goes nowhere, and does no harm
    replacement = await open_link(last.address)
    replacement.send(Lease(lease=chain.lease, min_blocks=8, want_blocks=8))
    await told(replacement, Leased)
    chain.links[1], chain.epoch = replacement, 2
    await chain.route([first.address, last.address])
    assert (await chain.step(part(1, [1, 2, 3]))).drawn
    await chain.close()


async def test_a_worker_outlives_garbage_and_a_peer_that_says_nothing(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    host, port = first.address.rsplit(":", 1)
    silent, _ = reader, writer = await asyncio.open_connection(host, int(port))
    garbage_reader, garbage = await asyncio.open_connection(host, int(port))
    garbage.write(os.urandom(4096))
    await asyncio.wait_for(garbage_reader.read(), DEADLINE_S)  # it hangs up
    garbage.close()
    link = await open_link(first.address)
    leased = await take_lease(link)
    link._transport.write(b"\0" * 64)  # type: ignore[union-attr] - no door leads here
    await closed(link)
    assert link.goodbye is not None and "does not begin a frame" in link.goodbye
    writer.close()
    chain = await Chain.open([first.address, last.address])
    assert (await chain.step(part(1, [1]))).drawn
    await chain.close()
    assert (await status_of(first)).leases == 0
    del leased, reader, silent


async def test_a_payload_of_the_wrong_length_closes_the_link_that_it_came_on(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    chain = await Chain.open([first.address, last.address])
    short = part(1, [1, 2])
    short.hidden = short.hidden[:1]
    chain.send(short)
    await closed(chain.links[0])
    assert "bytes of payload, its runs announce" in (chain.links[0].goodbye or "")
    await chain.close()


async def test_the_counters_of_a_worker_grow_with_its_steps(
    first: WorkerProcess, last: WorkerProcess, part: Make
) -> None:
    before = await status_of(last)
    chain = await Chain.open([first.address, last.address])
    await chain.step(part(1, [1, 2, 3]))
    await chain.close()
    after = await status_of(last)
    assert (after.steps - before.steps, after.tokens - before.tokens) == (1, 3)
    assert after.compute_s > before.compute_s and after.step_s
    assert after.received_bytes > before.received_bytes and after.sent_bytes > before.sent_bytes
    assert after.rss_bytes <= after.peak_rss_bytes
    assert after.read_bytes > 0 and after.gpu_memory_bytes is None


# --- numbers that are none -------------------------------------------------------------------


async def test_nan_is_a_fault_that_names_the_worker_which_first_made_it(
    first: WorkerProcess, checkpoint: Path, tmp_path: Path, part: Make
) -> None:
    folder = tmp_path / "overflows"
    spoil_layer_2(checkpoint, folder)
    with WorkerProcess("--model", str(folder), "--sections", "2", "--index", "1") as spoilt:
        chain = await Chain.open([first.address, spoilt.address])
        bad = part(2, [5], blocks=[1])
        bad.hidden = torch.zeros(1, 32)
        bad.hidden[0, 0] = 1e10
        done = await chain.step(part(1, [1, 2], blocks=[0]), bad, part(3, [4], blocks=[2]))
        await chain.close()
    (fault,) = done.faults
    assert (fault.sequence, fault.worker) == (2, spoilt.address)
    assert fault.reason.endswith("in hidden states after layers 2:4")
    assert [drawn.sequence for drawn in done.drawn] == [1, 3]


def spoil_layer_2(checkpoint: Path, folder: Path) -> None:
    """Layer 2 overflows float32 where the first hidden value alone is large, and only there."""
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    mlp = "model.layers.2.mlp."
    # The norm in front lets no value exceed the root of the hidden size: sqrt(32) = 5.7 where
    # one value is all there is, about 1 elsewhere. Gate times up is 1e37 * value^2.
    weights["model.layers.2.post_attention_layernorm.weight"].fill_(1)
    for name in ("gate_proj", "up_proj"):
        weights[mlp + name + ".weight"].zero_()[0, 0] = 10**18.6
    weights[mlp + "down_proj.weight"].mul_(1e-38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- the end ---------------------------------------------------------------------------------


async def test_sigterm_says_goodbye_with_the_reason_and_leaves_with_0(
    start: Callable[..., WorkerProcess], first: WorkerProcess
) -> None:
    leaving = start(1)
    chain = await Chain.open([first.address, leaving.address])
    code = await asyncio.to_thread(leaving.stop)
    await closed(chain.links[1])
    assert chain.links[1].goodbye == "worker is shutting down (SIGTERM)"
    assert code == 0
    lost = await told(chain.links[0], LinkLost)
    assert "it said goodbye: worker is shutting down (SIGTERM)" in lost.reason
    with pytest.raises(PeerLost):
        chain.links[1].send(Goodbye(reason="no"))
    await chain.close()
