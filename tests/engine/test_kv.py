"""KV blocks of a lease: what is in them before anything was written."""

from __future__ import annotations

import psutil
import pytest
import torch

from engine.kv import BLOCK_TOKENS, LARGE_BYTES, BlockCache, SiteShape

SITE = (0, 0)
SHAPE = SiteShape(num_heads=2, key_size=32, value_size=32)
CPU = torch.device("cpu")
BLOCK_BYTES = BLOCK_TOKENS * 2 * 32 * 4  # of the keys alone


def cache_of(num_blocks: int, dtype: torch.dtype = torch.float32) -> BlockCache:
    return BlockCache({SITE: SHAPE}, num_blocks, dtype, CPU)


@pytest.mark.parametrize("num_blocks", [1, 3, 2 * LARGE_BYTES // BLOCK_BYTES])
def test_a_new_lease_finds_nothing_of_the_one_whose_memory_it_gets(num_blocks: int) -> None:
    for _ in range(4):
        for kept in cache_of(num_blocks).tensors(SITE):
            assert not kept.any()
            kept.fill_(7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_blocks_take_memory_only_as_they_are_written(dtype: torch.dtype) -> None:
    process = psutil.Process()
    num_blocks = 256 * 2**20 // BLOCK_BYTES
    before = process.memory_info().rss
    cache = cache_of(num_blocks, dtype)
    keys, values = cache.tensors(SITE)
    assert keys.shape == values.shape == (num_blocks * BLOCK_TOKENS, 2, 32)
    assert keys.dtype == dtype and keys.is_contiguous() and keys.data_ptr() % 64 == 0
    assert process.memory_info().rss - before < 64 * 2**20
    slots = torch.tensor([5, 70_000])
    cache.write(SITE, slots, torch.ones(2, 2, 32, dtype=dtype), torch.ones(2, 2, 32, dtype=dtype))
    assert keys[slots].eq(1).all() and keys[70_001].eq(0).all()
