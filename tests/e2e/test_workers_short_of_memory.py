"""Workers whose memory has a limit, set by the kernel: they refuse with numbers, and go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import psutil
import pytest

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from proto.errors import WorkerRefused
from tests.support.chains import save_tiny_with_tokenizer, sections_of
from tests.support.fleet import Asked, ask_all
from tests.support.forked_workers import ForkedWorker, Nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits other processes")

MB = 10**6
KV_MB = 200
SHORT = Asked([5, 9, 40, 7], GenerationOptions(max_new_tokens=8, ignore_eos=True))
LONG = Asked([10 + at % 250 for at in range(512)], SHORT.options)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


def leave(worker: ForkedWorker, free_bytes: int) -> None:
    """From now on the worker can have so much more, and nothing beyond."""
    import resource

    limit = psutil.Process(worker.pid).memory_info().vms + free_bytes
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


async def test_what_does_not_fit_beside_the_old_layers_is_loaded_in_their_place(nursery, tmp_path):
    """Layers of 17 MB; there is room for four, but not for four beside the two that are held."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    tiny = save_tiny_with_tokenizer(tmp_path, max_position_embeddings=512, **sizes)
    words = sections_of(tiny.folder, 2, "--kv-memory", f"{KV_MB}MB")
    first, last = (nursery.start(*it) for it in words)
    settings = RecoverySettings(timeout_s=90, resplit_after_s=0)
    async with await Pipeline.open(
        [first.address, last.address], max_sequences=1, max_tokens_hint=64, recovery=settings
    ) as pipeline:
        undisturbed = await ask_all(pipeline, [SHORT])
        leave(first, (KV_MB + 85) * MB)
        heard = await ask_all(pipeline, [SHORT], on_token=lambda _, of_all: last.kill())
        assert [it.story for it in heard] == [it.story for it in undisturbed]
        assert pipeline.addresses == (first.address,)
    assert "loading other layers layers=0:4" in first.stderr
    assert "beside=False" in first.stderr


async def test_a_worker_out_of_memory_refuses_with_numbers_and_goes_on(nursery, tmp_path):
    """A step of 512 tokens takes 134 MB a matrix in the feed-forward part, one of 4 tokens 1 MB."""
    sizes = {"hidden_size": 32, "intermediate_size": 65536, "num_hidden_layers": 2}
    tiny = save_tiny_with_tokenizer(tmp_path, max_position_embeddings=4096, **sizes)
    (words,) = sections_of(tiny.folder, 1, "--kv-memory", "100GB")
    worker = nursery.start(*words)
    async with await Pipeline.open([worker.address], max_tokens_hint=600) as pipeline:
        undisturbed = await ask_all(pipeline, [SHORT])
        leave(worker, 100 * MB)
        refused = (await ask_all(pipeline, [LONG]))[0].completion.error
        assert refused is not None
        assert f"worker {worker.address}: out of memory in a step of 512 tokens of 1 s" in refused
        assert "MB are free" in refused
        heard = await ask_all(pipeline, [SHORT])
        assert [it.story for it in heard] == [it.story for it in undisturbed]
        with pytest.raises(WorkerRefused, match=r"cannot allocate \d{9,} bytes for \d+ KV blocks"):
            await Pipeline.open([worker.address], max_sequences=500, max_tokens_hint=4096)
        async with await Pipeline.open([worker.address], max_tokens_hint=50) as other:
            heard = await ask_all(other, [SHORT])
            assert [it.story for it in heard] == [it.story for it in undisturbed]
