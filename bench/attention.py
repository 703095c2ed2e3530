"""How near attention over KV blocks comes to the memory's speed, and what a call of it costs.

    python bench/attention.py [--context 16384] [--layers 22] [--json]

One token attends to a long context, layer after layer, so that every layer's keys and values come
from memory; the shape is a 1.1B Llama's (32 query heads, 4 KV heads of 64, bfloat16). Three ways:
the kernels, torch's path over consecutive blocks (which it reads in place) and over scattered ones
(which it gathers first); and each of them once more with keys and values in 8 bits. The read loop
sums the same tensors and does nothing else: what one thread can get of this memory. The cost of a
call is that of one layer at a context of 16 tokens, where hardly anything is computed. Processor
time of one thread, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.attention import CallSettings, StageRun, StepContext, attend, block_attention, running
from engine.kernels import native
from engine.kv import BLOCK_TOKENS, BlockCache, SiteShape
from engine.masks import FULL

HEADS, KV_HEADS, SIZE = 32, 4, 64
CPU: Final = torch.device("cpu")
ROUNDS: Final = 7


class Layers:
    """Keys and values of one sequence in many layers, and its next token."""

    def __init__(self, context: int, layers: int, quantize: str, *, scattered: bool) -> None:
        num_blocks = -(-context // BLOCK_TOKENS)
        shape = SiteShape(KV_HEADS, SIZE, SIZE)
        sites = [(layer, 0) for layer in range(layers)]
        shapes, slots = dict.fromkeys(sites, shape), torch.arange(num_blocks * BLOCK_TOKENS)
        self.cache = BlockCache(shapes, num_blocks, torch.bfloat16, CPU, quantize)
        for site in sites:
            rows = [torch.randn(len(slots), KV_HEADS, SIZE).bfloat16() for _ in range(2)]
            self.cache.write(site, slots, *rows)
        table = torch.randperm(num_blocks) if scattered else torch.arange(num_blocks)
        self.run = StageRun(start=context - 1, num_tokens=1, rope_length=context, blocks=table)
        self.rules = dict.fromkeys(sites, FULL)
        query, key, value = (
            torch.randn(1, it, SIZE).bfloat16() for it in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.parts = query, key, value
        query, key, value = (it.transpose(0, 1)[None] for it in self.parts)
        self.given = query, key, value  # as models hand them over
        self.bytes = layers * context * shape.bytes_per_token(torch.bfloat16, quantize)

    def step(self) -> StepContext:
        return StepContext(runs=[self.run], cache=self.cache, device=CPU, rules=self.rules)

    def attend(self) -> None:
        step, told = self.step(), CallSettings(SIZE**-0.5)
        for layer, _ in self.rules:
            step.enter_layer(layer)
            attend(step, *self.parts, told)

    def attend_as_models_do(self, module: torch.nn.Module) -> None:
        with running(self.step()) as step:
            for layer, _ in self.rules:
                step.enter_layer(layer)
                block_attention(module, *self.given)

    def read(self) -> None:
        for site in self.rules:
            for tensor in self.cache.tensors(site):
                tensor.view(torch.int64).sum()


def seconds(what: Callable[[], None], times: int = 1) -> float:
    """Processor time of this thread, of one call."""
    what()
    taken = []
    for _ in range(ROUNDS):
        before = time.thread_time()
        for _ in range(times):
            what()
        taken.append((time.thread_time() - before) / times)
    return statistics.median(taken)


def measure(context: int, num_layers: int) -> dict[str, float]:
    """GB/s of keys and values, and microseconds of a call."""
    figures: dict[str, float] = {}
    module = torch.nn.Module()
    with torch.inference_mode():
        for quantize, scattered in product(("none", "int8"), (False, True)):
            layers = Layers(context, num_layers, quantize, scattered=scattered)
            where = "scattered" if scattered else "consecutive"
            held = "" if quantize == "none" else f", {quantize}"
            if not scattered and not held:
                figures["read loop, GB/s"] = layers.bytes / seconds(layers.read) / 1e9
            for kernels in ("auto", "torch"):
                with native.chosen(kernels):
                    name = f"{native.name()}, {where} blocks{held}"
                    taken_s = seconds(layers.attend)
                    figures[f"{name}, GB/s"] = layers.bytes / taken_s / 1e9
                    figures[f"{name}, ms a step"] = 1e3 * taken_s
        for quantize, kernels in product(("none", "int8"), ("auto", "torch")):
            short = Layers(BLOCK_TOKENS, num_layers, quantize, scattered=False)
            with native.chosen(kernels):
                name = native.name() if quantize == "none" else f"{native.name()}, {quantize}"
                per_call = 1e6 / num_layers
                figures[f"{name}, a call, us"] = seconds(short.attend, 20) * per_call
                figures[f"{name}, a call through transformers' interface, us"] = (
                    seconds(partial(short.attend_as_models_do, module), 20) * per_call
                )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    native.set_threads(1)
    figures = measure(args.context, args.layers)
    if args.json:
        print(json.dumps({"load": os.getloadavg()[0], **figures}))
        return
    print(f"context {args.context}, {args.layers} layers, load {os.getloadavg()[0]:.1f}")
    for name, value in figures.items():
        print(f"{value:8.1f}  {name}")


if __name__ == "__main__":
    main()
