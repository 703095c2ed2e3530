"""Options of every `manager submit ...`, and what is done with a job that is ready for sbatch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from manager.slurm.scripts import Submission, submit_job

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a job is to be submitted, whatever it does."""

    name: str | None
    restarts: int
    requeue: bool
    dry_run: bool
    wait: bool
    as_json: bool

    def flags(self) -> list[str]:
        """Of sbatch."""
        return [] if self.requeue else ["--no-requeue"]

    def variables(self) -> dict[str, str]:
        """For the script."""
        return {"COMBOIO_RESTARTS": str(self.restarts)} if self.restarts else {}


def submission_options(command: Command) -> Command:
    """Add the options of `Asked`; the command gets it as `asked`."""

    @wraps(command)
    def with_asked(*args: Any, **values: Any) -> Any:
        asked = Asked(**{name: values.pop(name) for name in Asked.__slots__})
        return command(*args, asked=asked, **values)

    wrapped: Any = with_asked
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the job as one JSON object."),
        click.option("--wait", is_flag=True, help="Wait for the job's end, as `manager wait`."),
        click.option(
            "--dry-run", is_flag=True, help="Print the exact command and script; submit nothing."
        ),
        click.option(
            "--requeue/--no-requeue",
            default=True,
            show_default=True,
            help="Whether a job whose node failed, or that was preempted, is queued again.",
        ),
        click.option(
            "--restarts",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            metavar="N",
            help="Go on in so many further jobs when the time limit ends one.",
        ),
        click.option("--job-name", "name", metavar="NAME", help="What squeue calls it."),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def own_options(ctx: click.Context) -> set[str]:
    """The command's own options, without the site's and the submission's."""
    return {
        it.name or ""
        for it in ctx.command.params
        if isinstance(it, click.Option) and getattr(it, "settings_table", None) != "slurm"
    } - set(Asked.__slots__)


def publish(submission: Submission, asked: Asked) -> None:
    """Submit and say so, or show what would be submitted."""
    if asked.dry_run:
        click.echo(f"# {submission.script}\n{submission.script.read_text(encoding='utf-8')}")
        click.echo(f"# the command\n{submission.describe()}")
        return
    record = submit_job(submission, os.environ)
    log = submission.log_of(record.job_id)
    if asked.as_json:
        found = {
            "job_id": record.job_id,
            "name": record.name,
            "backend": record.backend,
            "log": log,
            "folder": record.folder,
        }
        click.echo(json.dumps(found))
    else:
        click.echo(record.job_id)
        click.echo(
            f"job {record.job_id} ({record.name}) is submitted; its log is {log}; "
            f"`manager logs {record.job_id} -f` follows it",
            err=True,
        )
    if asked.wait:
        from manager import event_loop
        from manager.slurm.wait_command import wait_for

        event_loop.run(wait_for(record.job_id, timeout_s=None))
