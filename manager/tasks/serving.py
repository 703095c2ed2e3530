"""The work of a pipeline job with --serve: the API on the first node, until somebody ends the job.

The server listens at the node's own address and asks for a key that lies in the job's folder, for
its owner's eyes. `manager cancel` leaves a file there, which lets the requests that run finish.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from manager import event_loop
from manager.new_file import write_new
from manager.options import ConnectionConfig
from manager.serve.config import Limits, ServeConfig
from manager.slurm.cancel_command import DRAIN_FILE, SERVING_FILE
from manager.slurm.pipeline_job import PipelineJob
from manager.tasks.node_address import own_address
from manager.tasks.section import say
from manager.tasks.slurm_task import SlurmTask
from proto.errors import Error

KEY_FILE: Final = "api-key"
LOOK_EVERY_S: Final = 0.5
DRAIN_S: Final = 600.0  # who has no such patience cancels once more
LOCAL_PORT: Final = 8000  # of the tunnel


async def serve_until_told(
    task: SlurmTask,
    job: PipelineJob,
    folder: Path,
    connection: ConnectionConfig,
    connect: Callable[[], Awaitable[ConnectionConfig]],
) -> None:
    """Serve, until the drain file is there or this is cancelled.

    Raises:
        Error: it cannot be served, in one sentence.
    """
    from manager.serve.command import check_installed

    check_installed("--serve")
    from manager.serve.server import run

    key_file = _key(folder)
    host = await event_loop.in_background(own_address, task, job.interface)
    adapters = () if job.options.adapter is None else (("adapter", job.options.adapter),)
    config = ServeConfig(
        connection=connection,
        host=host,
        port=job.port,
        adapters=adapters,
        limits=Limits(max_concurrent=max(64, job.batch_size), drain_timeout_s=DRAIN_S),
        api_key_file=key_file,
    )

    def ready(url: str, model: str) -> None:
        where = urlsplit(url)
        login = os.environ.get("SLURM_SUBMIT_HOST", "LOGIN_NODE")
        say(f"serving {model} at {url}; the API key is in {key_file}")
        say(
            "from your own machine: ssh -N -L "
            f"{LOCAL_PORT}:{where.netloc} {getpass.getuser()}@{login}, then "
            f"http://127.0.0.1:{LOCAL_PORT}/"
        )
        (folder / SERVING_FILE).write_text(json.dumps({"url": url, "model": model}))

    serving = asyncio.ensure_future(run(config, connect=connect, on_ready=ready))
    telling = asyncio.ensure_future(_until_told(folder))
    try:
        await asyncio.wait({serving, telling}, return_when=asyncio.FIRST_COMPLETED)
        if telling.done():
            say("told to end: the requests that run are finished first")
            serving.cancel()
        await serving
    finally:
        for it in (serving, telling):
            it.cancel()
        await asyncio.gather(serving, telling, return_exceptions=True)
        with suppress(OSError):
            (folder / SERVING_FILE).unlink()


async def _until_told(folder: Path) -> None:
    while DRAIN_FILE not in os.listdir(folder):  # noqa: ASYNC110 - another node writes it
        await asyncio.sleep(LOOK_EVERY_S)


def _key(folder: Path) -> Path:
    """The job's API key, its owner's alone; a job that was put back keeps it.

    Raises:
        Error: it cannot be written.
    """
    path = folder / KEY_FILE
    try:
        write_new(path, f"{secrets.token_urlsafe(32)}\n".encode())
    except FileExistsError:
        pass
    except OSError as exc:
        raise Error(f"cannot write {path}: {exc.strerror}") from exc
    return path
