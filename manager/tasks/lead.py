"""The first task's own work: from the first worker's start to the report of all nodes.

It waits until all sections are ready, sends a token through them, runs what the job was submitted
for, and says at the end what each node did. A worker that went away is waited for: its task starts
it anew, and a batch goes on where it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from manager.links import NextUnreachable
from manager.options import ConnectionConfig
from manager.output import Notices
from manager.slurm.pipeline_job import PipelineJob
from manager.tasks.array_results import join_parts
from manager.tasks.node_report import NodeReport, check_all_worked, describe, look_at_nodes
from manager.tasks.rendezvous import Rendezvous, TaskNote, failure, missing
from manager.tasks.section import say
from manager.tasks.slurm_task import SlurmTask
from proto.errors import Error, UsageError, WorkerLost

SILENCE_S: Final = 10.0  # between two lines of the log that say who is waited for
RETRY_S: Final = 0.2
NOTHING_KEPT: Final = "nothing was begun"

Notes = Mapping[int, TaskNote]
Kind = TypeVar("Kind", bound=Error)


class Lead:
    """The manager of a pipeline job."""

    def __init__(
        self, task: SlurmTask, job: PipelineJob, rendezvous: Rendezvous, secret_file: Path
    ) -> None:
        self._task, self._rendezvous = task, rendezvous
        self._whole = job
        self._job = job if task.array is None else job.one_of(*task.array)
        self._secret_file = secret_file
        self.kept = NOTHING_KEPT  # in words, for whoever ends the job early

    async def run(self) -> None:
        """All of it.

        Raises:
            Error: a section failed, or the work did.
        """
        if self._is_done_already():
            say("all results are there already: an earlier run of this job finished them")
            return
        self._check_files()
        started_s = time.monotonic()
        notes = await self._all_ready(None)
        say(f"all {len(notes)} sections are ready after {time.monotonic() - started_s:.1f} s")
        notes, before = await self._try_out(notes)
        try:
            notes = await self._work(notes)
        finally:
            self._join_parts()
        try:
            reports = await look_at_nodes(notes, self._secret_file)
        except WorkerLost as exc:  # all is done, and the worker may be starting anew
            say(f"what each node did is not known: {exc}")
            return
        say(describe(reports, before))
        check_all_worked(reports, before)

    def _is_done_already(self) -> bool:
        """Whether the job was put back into the queue after its last row."""
        own, whole = self._job.output, self._whole.output
        if own is None or whole is None or self._task.restart == 0 or self._job.overwrite:
            return False
        is_begun = own.with_name(own.name + ".partial").exists()
        return not is_begun and (own.exists() or whole.exists())

    def _check_files(self) -> None:
        """Look at what the work reads and writes, before a model is loaded for it.

        Raises:
            UsageError: this node does not see it.
        """
        for name, path in (("--output", self._job.output), ("--metrics", self._job.metrics)):
            if path is not None and not path.parent.is_dir():
                raise UsageError(
                    f"{name}: {self._task.node} does not see the folder {path.parent}; name one on "
                    "a file system that all nodes share."
                )
        if self._job.prompts is not None:
            self._job.rows()

    def _join_parts(self) -> None:
        if self._job.part is None or self._whole.output is None:
            return
        if join_parts(self._whole.output, self._job.part[1]):
            say(f"all {self._job.part[1]} parts are there: joined into {self._whole.output}")

    async def _all_ready(self, deadline_s: float | None) -> Notes:
        """Wait until every section has a worker.

        Args:
            deadline_s: None waits as long as it takes to load a model.
        Raises:
            Error: one failed for good, or the deadline passed.
        """
        started_s = said_s = time.monotonic()
        async for notes in self._rendezvous.changes():
            if failed := failure(notes, "section"):
                raise failed
            late = missing(notes, self._task.num_tasks)
            if not late:
                return notes
            now_s = time.monotonic()
            if deadline_s is not None and now_s - started_s > deadline_s:
                raise Error(f"{_late(late, notes)} not back within {deadline_s:g} s")
            if now_s - said_s > SILENCE_S:
                said_s = now_s
                say(f"{_late(late, notes)} not ready yet")
        raise AssertionError("changes() does not end")

    async def _try_out(self, notes: Notes) -> tuple[Notes, list[NodeReport]]:
        """A token through all sections; where they are now, and what each had counted then."""
        while True:
            try:
                await self._send_token(notes)
                return notes, await look_at_nodes(notes, self._secret_file)
            except Error as exc:
                notes = await self._after(exc, notes)

    async def _send_token(self, notes: Notes) -> None:
        """One token through all sections: only then is the pipeline ready."""
        from manager.connection import open_pipeline
        from manager.encoding import Prompt
        from manager.generation import GenerationOptions

        started_s, notices = time.monotonic(), Notices()
        async with open_pipeline(
            self._connection(notes, trace=None), notices, max_sequences=1, max_tokens_hint=2
        ) as pipeline:
            options = GenerationOptions(max_new_tokens=1, ignore_eos=True)
            completion = await pipeline.generate(Prompt((0,)), options)
            if completion.error is not None:
                raise Error(f"no token goes through the sections: {completion.error}")
        took_s = time.monotonic() - started_s
        say(f"ready: a token went through {self._task.num_tasks} sections ({took_s:.1f} s)")

    async def _work(self, notes: Notes) -> Notes:
        """Run it, again where a worker went away and came back; where the sections are now."""
        while True:
            try:
                if self._job.serve:
                    await self._serve(notes)
                elif self._job.prompts is None:
                    await self._generate(notes)
                else:
                    await self._batch(notes)
                return notes
            except Error as exc:
                notes = await self._after(exc, notes)

    async def _after(self, exc: Error, notes: Notes) -> Notes:
        """Wait for the worker whose loss it tells of.

        Args:
            notes: where the sections were.
        Raises:
            Error: it tells of something else, or the worker does not come back in time.
        """
        lost = _cause(exc, WorkerLost)
        if lost is None and _cause(exc, NextUnreachable):
            lost = await self._gone(notes)
        if lost is None:
            raise exc
        say(f"{exc}; waiting for it to come back")
        return await self._come_back(lost)

    async def _gone(self, notes: Notes) -> WorkerLost | None:
        """The loss of one of the workers, if one does not answer here either."""
        try:
            await look_at_nodes(notes, self._secret_file)
        except WorkerLost as exc:
            return exc
        return None

    async def _come_back(self, lost: WorkerLost) -> Notes:
        """Wait until all sections answer again.

        Raises:
            Error: one does not within the recovery timeout.
        """
        deadline_s = time.monotonic() + self._job.recovery_timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            notes = await self._all_ready(max(left_s, 0.0))
            try:
                await look_at_nodes(notes, self._secret_file)
                return notes
            except WorkerLost as exc:
                if left_s <= 0:
                    rank = next(
                        (it.rank for it in notes.values() if it.address == exc.worker), None
                    )
                    where = f"section {rank} on {notes[rank].node}" if rank is not None else "it"
                    raise Error(
                        f"{lost}, and {where} has not come back within "
                        f"{self._job.recovery_timeout_s:g} s"
                    ) from exc
            await asyncio.sleep(RETRY_S)

    async def _serve(self, notes: Notes) -> None:
        from manager.tasks.serving import serve_until_told

        self.kept = "requests that ran were ended"

        async def connect() -> ConnectionConfig:
            """A worker that was lost comes back at another port."""
            found = await self._all_ready(self._job.recovery_timeout_s)
            return self._connection(found, trace=None)

        await serve_until_told(
            self._task,
            self._job,
            self._secret_file.parent,
            self._connection(notes, trace=self._job.trace),
            connect,
        )

    async def _generate(self, notes: Notes) -> None:
        from manager import generate

        assert self._job.prompt is not None
        self.kept = "the text so far is in the log"
        config = generate.GenerateConfig(
            prompt=self._job.prompt,
            options=self._job.options,
            connection=self._connection(notes, trace=self._job.trace),
            chat=self._job.template.chat,
            system=self._job.template.system,
        )
        await generate.run(config)

    async def _batch(self, notes: Notes) -> None:
        from manager import batch
        from manager.results import open_results

        assert self._job.prompts is not None and self._job.output is not None
        config = batch.BatchConfig(
            prompts=self._job.prompts,
            options=self._job.options,
            connection=self._connection(notes, trace=self._job.trace),
            batch_size=self._job.batch_size,
            iters=self._job.iters,
            template=self._job.template,
            output=self._job.output,
            overwrite=self._job.overwrite,
            metrics=self._job.metrics,
        )
        rows = self._job.rows()
        with open_results(self._job.output, rows, overwrite=self._begins_anew()) as results:
            try:
                await batch.run(config, rows, results)
            finally:
                self.kept = results.kept

    def _begins_anew(self) -> bool:
        """`--overwrite` is for the first try; the next one goes on with what that one kept."""
        assert self._job.output is not None
        partial = self._job.output.with_name(self._job.output.name + ".partial")
        is_next_try = self._task.restart > 0 or self.kept != NOTHING_KEPT
        return self._job.overwrite and not (is_next_try and partial.exists())

    def _connection(self, notes: Notes, *, trace: Path | None) -> ConnectionConfig:
        return ConnectionConfig(
            workers=",".join(notes[rank].address for rank in sorted(notes)),
            model=self._job.model,
            secret_file=self._secret_file,
            trace=trace,
            recovery_timeout=0.0,  # a worker comes back at another port: we look for it ourselves
        )


def _late(ranks: Sequence[int], notes: Notes) -> str:
    shown = [
        f"section {rank} on {notes[rank].node}" if rank in notes else f"section {rank}"
        for rank in ranks
    ]
    verb = "is" if len(shown) == 1 else "are"
    return f"{', '.join(shown)} {verb}"


def _cause(exc: Error, kind: type[Kind]) -> Kind | None:
    """The error of that kind behind an error, or itself, if there is one."""
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, kind):
            return found
        found = found.__cause__
    return None
