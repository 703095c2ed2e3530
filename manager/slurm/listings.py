"""What squeue, sacct and scontrol print, as jobs.

Pure: text in, `Job`s out; and the arguments that make the commands print it so. Names of jobs may
hold anything, also spaces, `|` and line ends: squeue and sacct are told to put control characters
between fields, and scontrol's pages are read from both ends of the name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import Final

from manager.slurm.job import Job, plain_state

# ASCII's own separators, of records and of units.
RECORD: Final = "\x1e"
UNIT: Final = "\x1f"

QUEUE_FORMAT: Final = RECORD + UNIT.join(
    ("%i", "%A", "%u", "%P", "%T", "%r", "%D", "%N", "%M", "%l", "%V", "%S", "%e", "%j")
)
ACCOUNT_FIELDS: Final = (
    "JobID",
    "JobIDRaw",
    "User",
    "Partition",
    "State",
    "Reason",
    "NNodes",
    "NodeList",
    "ElapsedRaw",
    "Timelimit",
    "Submit",
    "Start",
    "End",
    "ExitCode",
    "JobName",  # the last one: it may hold what separates
)

_CLOCK: Final = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)(?:\.\d+)?")
_NO_NODES: Final = frozenset({"", "(null)", "None assigned", "None", "n/a", "N/A"})


def parse_queue(text: str) -> list[Job]:
    """What `squeue --noheader --format QUEUE_FORMAT` printed."""
    rows = (row.removesuffix("\n").split(UNIT, 13) for row in text.split(RECORD)[1:])
    return [_queued(row) for row in rows if len(row) == 14]


def parse_accounts(text: str) -> list[Job]:
    """What `sacct -nXP --delimiter UNIT --format ACCOUNT_FIELDS` printed."""
    rows: list[list[str]] = []
    for line in text.removesuffix("\n").split("\n"):
        cells = line.split(UNIT, len(ACCOUNT_FIELDS) - 1)
        if len(cells) == len(ACCOUNT_FIELDS):
            rows.append(cells)
        elif rows:  # a name with a line's end in it
            rows[-1][-1] += "\n" + line
    return [_accounted(row) for row in rows]


def parse_pages(text: str) -> list[Job]:
    """What `scontrol show job` printed (not with `--oneliner`)."""
    pages = re.split(r"^(?=JobId=\d)", text, flags=re.MULTILINE)
    return [job for job in map(_paged, pages) if job is not None]


def parse_clock(text: str) -> int | None:
    """Seconds in "5:03", "1:00:00" or "2-03:00:00"; None for UNLIMITED and the like."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(it or 0) for it in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_time(text: str) -> float | None:
    """Unix seconds of "2026-11-21T02:59:44", local time; None for N/A, Unknown and None."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def parse_exit_code(text: str) -> int | None:
    """ "3:0" as 3, "0:9" as 137 (128 + signal); None where it is none."""
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None:
        return None
    code, signal = int(match[1]), int(match[2])
    return 128 + signal if signal else code


def _queued(cells: list[str]) -> Job:
    job_id, raw_id, user, partition, state, reason, num_nodes, nodes = cells[:8]
    elapsed, limit, submitted, started, ended, name = cells[8:]
    return Job(
        id=job_id,
        raw_id=raw_id,
        name=name,
        user=user,
        partition=partition,
        state=plain_state(state),
        reason=_reason(reason),
        num_nodes=_count(num_nodes),
        nodes=_nodes(nodes),
        elapsed_s=parse_clock(elapsed),
        limit_s=parse_clock(limit),
        submitted_at=parse_time(submitted),
        started_at=parse_time(started),
        ended_at=parse_time(ended),
    )


def _accounted(cells: list[str]) -> Job:
    # The same fields in the same order, and the exit code.
    job = _queued([*cells[:13], cells[14]])
    return replace(
        job,
        elapsed_s=int(cells[8]) if cells[8].isdigit() else None,
        exit_code=parse_exit_code(cells[13]),
    )


def _paged(page: str) -> Job | None:
    # The name ends where the line with the user begins: the last such line, for the name may
    # look like one.
    head, found, rest = page.rpartition("\n   UserId=")
    match = re.match(r"JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\S+))?", head)
    if match is None or not found:
        return None
    name = re.search(r"\bJobName=(.*)", head[match.end() :], re.DOTALL)
    # A command's own words may look like fields, too: what comes first is Slurm's.
    values = dict(re.findall(r"(?:^|(?<=\s))([\w:/]+)=(\S*)", "UserId=" + rest)[::-1])
    raw_id, array, task = match.groups()
    job_id = raw_id
    if array is not None:
        job_id = f"{array}_{task}" if task.isdigit() else f"{array}_[{task}]"
    log = re.search(r"^   StdOut=(.*)$", rest, re.MULTILINE)
    return Job(
        id=job_id,
        raw_id=raw_id,
        name=name[1] if name else "",
        user=values["UserId"].partition("(")[0],
        partition=values.get("Partition", ""),
        state=plain_state(values.get("JobState", "")),
        reason=_reason(values.get("Reason", "")),
        num_nodes=_count(values.get("NumNodes", "")),
        nodes=_nodes(values.get("NodeList", "")),
        elapsed_s=parse_clock(values.get("RunTime", "")),
        limit_s=parse_clock(values.get("TimeLimit", "")),
        submitted_at=parse_time(values.get("SubmitTime", "")),
        started_at=parse_time(values.get("StartTime", "")),
        ended_at=parse_time(values.get("EndTime", "")),
        exit_code=parse_exit_code(values.get("ExitCode", "")),
        log=log[1].strip() if log and log[1].strip() not in _NO_NODES else None,
    )


def _reason(text: str) -> str:
    text = text.strip()
    return "None" if text in ("", "(null)", "null") else text


def _nodes(text: str) -> str:
    text = text.strip()
    return "" if text in _NO_NODES else text


def _count(text: str) -> int:
    """ "3" or "3-5" (at least, at most) or "1K"."""
    match = re.match(r"(\d+)([Kk]?)", text.strip())
    return int(match[1]) * (1000 if match[2] else 1) if match else 0
