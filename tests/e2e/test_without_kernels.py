"""Where no compiler was at installation, torch computes: the same texts, and the worker says so."""

from __future__ import annotations

import json
from contextlib import ExitStack

from tests.support.chains import manager
from tests.support.processes import WorkerProcess


def test_the_torch_path_gives_the_same_text_and_is_named_at_the_start() -> None:
    said = []
    for kernels in ("auto", "torch"):
        with ExitStack() as stack:
            workers = [
                stack.enter_context(
                    WorkerProcess(
                        *("--sections", "2", "--index", str(index), "--dtype", "bfloat16"),
                        *("--compress", "off" if index else "on"),
                        env={"COMBOIO_KERNELS": kernels},
                        wait=False,
                    )
                )
                for index in range(2)
            ]
            for worker in workers:
                worker.wait_until_ready()
            addresses = ",".join(str(worker.address) for worker in workers)
            run = manager(
                *("generate", "def add(a, b):", "--workers", addresses),
                *("--max-new-tokens", "6", "--json"),
            )
            assert run.returncode == 0, run.stderr
            said.append(json.loads(run.stdout)["token_ids"])
            line = workers[0].wait_for_stderr("kernels: ")
            assert line.rstrip().endswith("kernels: torch") == (kernels == "torch")
            if kernels != "torch":
                workers[0].wait_for_stderr("weights of 16 bits are held in 12, exactly")
    assert said[0] == said[1]
