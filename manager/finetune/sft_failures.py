"""Why a run of several processes ended badly: one sentence out of what everybody said.

A process that fails takes the others with it, and they complain too: what is looked for is the
first cause. Texts in, an error out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Final

from engine.jobs.sft_messages import Failed, Hello
from manager.finetune.sft_launch import Launch
from proto.errors import Error, UsageError

KILLED: Final = 9

# As torch's launcher lists the processes that failed first, and as accelerate does for one alone.
_ENTRY: Final = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")
_DIED: Final = re.compile(r"died with <Signals\.\w+: (\d+)>")
_PORT_TAKEN: Final = re.compile(
    r"another process is utilizing it|EADDRINUSE|address already in use", re.IGNORECASE
)
_NOBODY: Final = re.compile(
    r"RendezvousConnectionError|RendezvousTimeoutError|DistNetworkError|DistStoreError"
    r"|client socket has timed out|TCPStore",
)
_LAST_WORDS: Final = re.compile(r"^(\w+(?:\.\w+)*(?:Error|Exception|Timeout)\b.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is known of a run that is over on this machine."""

    launch: Launch
    exit_code: int  # of the launcher
    printed: str  # by the launcher
    processes: Mapping[int, Hello]  # by rank, those of this machine
    failures: Sequence[Failed]  # in the order in which they were told


def explain(ended: Ended) -> Error:
    """The error to raise."""
    own = [it for it in ended.failures if not it.lost_others]
    for failed in own:
        if failed.exit_code == UsageError.exit_code:
            return UsageError(failed.sentence)
    signalled = _signalled(ended)
    if signalled is not None:
        return _killed(ended, *signalled)
    if own:
        return Error(_with_log(ended, own[0]))
    if ended.failures:
        first = ended.failures[0]
        return Error(
            f"{_name(ended, first.rank)} lost the connection to the others ({first.sentence}): one "
            f"of them ended or is not reached; its machine's log in {ended.launch.folder} says why."
        )
    return _never_began(ended)


def was_killed(ended: Ended) -> bool:
    """Whether a process was ended by SIGKILL before anybody here had a reason to send it."""
    found = _signalled(ended)
    own = [it for it in ended.failures if not it.lost_others]
    return found is not None and found[1] == KILLED and not own


def _signalled(ended: Ended) -> tuple[int, int] | None:
    """(rank, signal) of a process that a signal ended."""
    for rank, code in _ENTRY.findall(ended.printed):
        if int(code) < 0:
            return int(rank), -int(code)
    if died := _DIED.search(ended.printed):
        return 0, int(died[1])
    return None


def _killed(ended: Ended, rank: int, number: int) -> Error:
    try:
        name = Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = ""
    if number == KILLED:
        hint = " (as the kernel ends one when memory is short: try a smaller --batch-size)"
    log = ended.processes[rank].log_file if rank in ended.processes else ended.launch.log_file
    return Error(
        f"{_name(ended, rank)} was ended by {name}{hint}; its log is {log}, and --resume goes on "
        "from the last checkpoint."
    )


def _with_log(ended: Ended, failed: Failed) -> str:
    hello = ended.processes.get(failed.rank)
    if ended.launch.job.num_processes == 1 or hello is None:
        where = "" if hello is None else f"; its log is {hello.log_file}"
        return f"{failed.sentence.rstrip('.')}{where}."
    return (
        f"{_name(ended, failed.rank)} failed: {failed.sentence.rstrip('.')}; "
        f"its log is {hello.log_file}."
    )


def _never_began(ended: Ended) -> Error:
    launch, machines = ended.launch, ended.launch.machines
    log = f"the launcher's log is {launch.log_file}"
    if _PORT_TAKEN.search(ended.printed):
        return Error(
            f"port {machines.main_port} of {machines.main_address or 'this machine'} is taken: "
            f"name a free one with --main-process-port, the same on all machines; {log}."
        )
    if not machines.is_alone and _NOBODY.search(ended.printed):
        return Error(
            f"machine {machines.rank} of {machines.count} did not meet the others at "
            f"{machines.main_address}:{machines.main_port}: start the same command on all "
            "machines at the same time, and name the network that they share with --interface; "
            f"{log}."
        )
    if len(ended.processes) == launch.processes_here:
        return Error(
            f"the processes on this machine ended with code {ended.exit_code} and said nothing; "
            f"their logs are in {launch.folder}."
        )
    said = _LAST_WORDS.findall(ended.printed)
    reason = f" ({' '.join(said[-1].split())[:300]})" if said else ""
    return Error(
        f"accelerate launch ended with code {ended.exit_code} after starting "
        f"{len(ended.processes)} of {launch.processes_here} processes{reason}; {log}."
    )


def _name(ended: Ended, rank: int) -> str:
    total = ended.launch.job.num_processes
    if total == 1:
        return "the training process"
    hello = ended.processes.get(rank)
    host = "" if hello is None else f" on {hello.host}"
    return f"process {rank} of {total}{host}"
