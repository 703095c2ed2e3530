"""A real Slurm cluster on this machine, for tests: booted, asked, broken, mended and stopped.

The shell scripts in tests/slurm/cluster do the work; this file gives them a number that no other
cluster has, an environment without anybody's Slurm settings, and a deadline for every command.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from manager.slurm.records import JobRecord, Records
from tests.support.processes import ROOT, Answer, clean_environment

SCRIPTS = ROOT / "tests" / "slurm" / "cluster"
PARTITIONS = ("debug", "long")  # the first is the default; both have all nodes
CPUS, MEMORY_MB, GPUS = 32, 512_000, 4  # what every node claims to have

# Every state that a job does not leave again by itself.
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
)
# An own environment, as on a machine that never was part of a cluster.
FOREIGN = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "OMPI_", "PMIX_")


class SlurmCluster:
    """Nodes node1, node2, ... with a controller; `env` is the environment of a login node."""

    def __init__(self, directory: Path, num_nodes: int, env: Mapping[str, str]) -> None:
        self.directory, self.num_nodes = directory, num_nodes
        self.folder = directory / "shared"  # for scripts and logs: every node sees it
        self.folder.mkdir()
        self.jobs_file = directory / "jobs.jsonl"  # the records of `manager`
        self.env = {**env, "COMBOIO_JOBS_FILE": str(self.jobs_file)}
        conf = (directory / "run" / "conf").read_text(encoding="utf-8")
        self.network = re.findall(r"net=(\S+)", conf)[0]  # node3 is network.3

    @cached_property
    def name(self) -> str:
        """What the cluster calls itself."""
        found = re.search(r"ClusterName\s*=\s*(\S+)", self.sh("scontrol", "show", "config").stdout)
        assert found
        return found[1]

    # --- Slurm's own commands

    def sh(
        self,
        *words: object,
        check: bool = True,
        timeout: float = 120.0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as a user of the cluster; its output as text."""
        return subprocess.run(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd or self.folder,
            env={**self.env, **(env or {})},
            check=check,
        )

    def submit(self, *words: object, cwd: Path | None = None) -> int:
        """`sbatch --parsable WORDS`: the job's id. Its log is in `folder` unless told otherwise."""
        return int(self.sh("sbatch", "--parsable", *words, cwd=cwd).stdout.split(";")[0])

    def job(self, job_id: object) -> dict[str, str]:
        """What `scontrol show job` says; values end at their first space."""
        said = self.sh("scontrol", "-o", "show", "job", job_id).stdout
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", said))

    def wait(
        self, job_id: object, states: Collection[str] = ENDED, timeout: float = 240.0
    ) -> dict[str, str]:
        """Wait until the job is in one of these states; AssertionError when it never is."""
        give_up_s = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < give_up_s, f"job {job_id} does not get to {states}: {job}"
            time.sleep(0.1)  # slurmctld tells nobody
        return job

    def wait_running(self, job_id: object, timeout: float = 240.0) -> dict[str, str]:
        """Wait until it runs; AssertionError if it ended before."""
        job = self.wait(job_id, ("RUNNING", *ENDED), timeout)
        assert job["JobState"] == "RUNNING", f"job {job_id} ended: {job}"
        return job

    def wait_accounted(self, job_id: object) -> None:
        """Wait until the accounts know all of an ended job (boot with -A).

        Its end may arrive there before its beginning, which brings the partition and the name.
        """
        words = ("sacct", "-nXP", "-o", "Partition,State,End", "-j", job_id)
        self._until(
            f"the accounts know job {job_id}",
            lambda: (
                bool(said := self.sh(*words).stdout)
                and not re.search(r"^\||Unknown|PENDING|RUNNING", said, re.MULTILINE)
            ),
        )

    def wait_reason(self, job_id: object, reason: str, timeout: float = 120.0) -> None:
        """Wait until the scheduler has looked at a job that waits, and says this of it."""
        self._until(
            f"job {job_id} waits for {reason}",
            lambda: self.job(job_id)["Reason"] == reason,
            timeout,
        )

    def wait_text(self, log: Path, words: str, timeout: float = 120.0) -> None:
        """Wait until a job has printed this; before that, it may not have begun though it runs."""
        self._until(
            f"{log} says {words!r}",
            lambda: log.exists() and words in log.read_text(encoding="utf-8", errors="replace"),
            timeout,
        )

    def time_out(self, job_id: object) -> None:
        """Let its time be over within seconds: real limits are whole minutes. It must run."""
        self.sh("scontrol", "update", f"jobid={job_id}", "EndTime=now+1")

    def start_requeued(self, job_id: object) -> None:
        """Let a requeued job start soon, not in two minutes.

        Not at once: a node refuses a job that was started in the second in which it was ended. And
        a node that ends a job's steps looks every second whether one is left, by the job's number:
        it would end a step of the new start as well.
        """
        self.wait_reason(job_id, "BeginTime")
        self._until(f"no node has a step of job {job_id}", lambda: not self._has_steps(job_id))
        self.sh("scontrol", "update", f"jobid={job_id}", "StartTime=now+4")

    def _has_steps(self, job_id: object) -> bool:
        """Whether a node still has a process that cares for a step of the job."""
        nodes = {_network_of(pid) for pid in self._pids(r"node\d+")}
        return any(
            title.startswith(f"slurmstepd: [{job_id}.") and _network_of(pid) in nodes
            for pid, title in _titles()
        )

    def _pids(self, name: str) -> list[str]:
        """Of what was started under a name that fits, newest last; a slurmd has its node's."""
        pids = (self.directory / "run" / "pids").read_text(encoding="utf-8")
        return re.findall(rf"^(\d+) \d+ {name}$", pids, re.MULTILINE)

    def cancel_all(self) -> None:
        """End whatever is queued or runs, and wait until it is gone."""
        self.sh("scancel", "--quiet", "--user", str(os.getuid()), check=False)
        self._until("the queue is empty", lambda: not self.sh("squeue", "-h").stdout.strip())

    # --- nodes

    def node(self, verb: str, number: int) -> None:
        """crash, stop, start, cut or heal a node: see node.sh."""
        self.sh(SCRIPTS / "node.sh", self.directory, verb, number)

    def mend(self) -> None:
        """Start the nodes that are down, and wait until all are idle."""
        self.cancel_all()
        for number in range(1, self.num_nodes + 1):
            if self.node_state(number).startswith(("DOWN", "IDLE+DRAIN", "IDLE+NOT_RESP")):
                self.sh(SCRIPTS / "node.sh", self.directory, "start", number, check=False)
                self.sh("scontrol", "update", f"nodename=node{number}", "state=resume", check=False)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until every node is there and has nothing left to do."""
        self._until("all nodes are idle", self._all_idle)

    def node_state(self, number: int) -> str:
        """As scontrol names it: IDLE, ALLOCATED, DOWN*..."""
        said = self.sh("scontrol", "-o", "show", "node", f"node{number}").stdout
        found = re.search(r"\bState=(\S+)", said)
        assert found, said
        return found[1]

    @contextmanager
    def hidden_from(self, number: int, folder: Path) -> Iterator[None]:
        """For the block, this node sees an empty folder there, as if it were not shared."""
        with self._mounted(number, folder, "-t", "tmpfs", "hidden"):
            yield

    @contextmanager
    def replaced_on(self, number: int, folder: Path, other: Path) -> Iterator[None]:
        """For the block, this node sees another folder's content there."""
        with self._mounted(number, folder, "--bind", str(other)):
            yield

    @contextmanager
    def _mounted(self, number: int, folder: Path, *words: str) -> Iterator[None]:
        slurmd = self._pids(f"node{number}")[-1]
        inside = ("nsenter", f"--mount=/proc/{slurmd}/ns/mnt")
        self.sh(*inside, "mount", *words, folder)
        try:
            yield
        finally:
            self.sh(*inside, "umount", "--lazy", folder)

    def _all_idle(self) -> bool:
        return all(self.node_state(it + 1) == "IDLE" for it in range(self.num_nodes))

    def _until(self, what: str, is_so: Callable[[], bool], timeout: float = 120.0) -> None:
        give_up_s = time.monotonic() + timeout
        while not is_so():
            assert time.monotonic() < give_up_s, f"it never came that {what}"
            time.sleep(0.1)

    # --- the controller

    def stop_controller(self) -> None:
        """End slurmctld: nobody answers any more."""
        for pid in self._pids("slurmctld"):
            self.sh("kill", pid, check=False)
        self._until("the controller has ended", lambda: not self._answers())

    def start_controller(self) -> None:
        """Start slurmctld again; it knows what it knew."""
        script = f"dir={self.directory}; . {SCRIPTS}/lib.sh; start slurmctld slurmctld -D"
        self.sh("bash", "-c", script)
        self._until("the controller answers", self._answers)

    def _answers(self) -> bool:
        return " is UP" in self.sh("scontrol", "ping", check=False).stdout

    # --- our command

    def record(self, records: Records, job_id: object, **values: Any) -> None:
        """Note a submission, as `manager submit` does."""
        told = {
            "cluster": self.name,
            "backend": "pipeline",
            "name": "run",
            "submitted_at": 1_700_000_000.0,
            "folder": str(self.folder),
            "log": f"slurm-{job_id}.out",
            "command": ("manager", "submit", "pipeline"),
        }
        records.add(JobRecord(job_id=str(job_id), **{**told, **values}))

    def manager(
        self,
        *words: object,
        check: bool = False,
        timeout: float = 240.0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Answer:
        """Run `manager` to its end as a user of the cluster; with `check` it must leave with 0."""
        done = self.sh(
            sys.executable, "-m", "manager", *words, check=False, timeout=timeout, cwd=cwd, env=env
        )
        answer = Answer(done.returncode, done.stdout, done.stderr)
        assert not check or done.returncode == 0, answer
        return answer

    def start_manager(
        self,
        *words: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start `manager` and leave it running; whoever starts it ends it (`with`)."""
        return subprocess.Popen(
            [sys.executable, "-m", "manager", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.folder,
            env={**self.env, **(env or {})},
        )


@contextmanager
def boot_cluster(num_nodes: int = 3, *flags: str) -> Iterator[SlurmCluster]:
    """A cluster for the block; nothing of it is left afterwards.

    Args:
        flags: further ones of boot.sh, for example `-A` for accounting.
    """
    # Unix sockets lie below it, and their paths end at 108 bytes: pytest's folders are too long.
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    directory.chmod(0o755)
    with _own_number() as number:
        try:
            env = _boot(directory, number, num_nodes, flags)
            yield SlurmCluster(directory, num_nodes, env)
        finally:
            subprocess.run(
                [SCRIPTS / "stop.sh", directory, "--rm"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=120,
                env=_login_environment(),
                check=False,
            )
            shutil.rmtree(directory, ignore_errors=True)


def why_no_slurm() -> str | None:
    """Why no cluster can be booted here, or None."""
    missing = [it for it in ("slurmctld", "slurmd", "munged", "sbatch") if not _which(it)]
    if missing:
        return f"needs a Slurm cluster to boot; there is no {', '.join(missing)} here"
    return None


def why_no_accounting() -> str | None:
    """Why no cluster with accounting can be booted here, or None."""
    missing = [it for it in ("slurmdbd", "mariadbd", "mysql_install_db") if not _which(it)]
    return f"needs Slurm's accounting; there is no {', '.join(missing)} here" if missing else None


def _which(command: str) -> str | None:
    return shutil.which(command, path=_login_environment()["PATH"])


def _boot(directory: Path, number: int, num_nodes: int, flags: tuple[str, ...]) -> dict[str, str]:
    words = {
        "-d": directory,
        "-i": number,
        "-n": num_nodes,
        "-p": " ".join(PARTITIONS),
        "-c": CPUS,
        "-M": MEMORY_MB,
        "-g": GPUS,
        "-w": os.getpid(),  # ends with the tests, however they end
    }
    env = _login_environment()
    boot = subprocess.run(
        [SCRIPTS / "boot.sh", *(str(it) for pair in words.items() for it in pair), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        env=env,
        check=False,
    )
    assert boot.returncode == 0, boot.stdout
    told = re.findall(r"(\w+)=(\S+)", (directory / "env.sh").read_text(encoding="utf-8"))
    return {**env, **dict(told)}


def _login_environment() -> dict[str, str]:
    env = {key: it for key, it in clean_environment().items() if not key.startswith(FOREIGN)}
    return {**env, "PATH": f"{env['PATH']}:/usr/sbin:/sbin"}


@contextmanager
def _own_number() -> Iterator[int]:
    """A number from 1 to 19 for ports, addresses and namespaces; it is ours until the end."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    first = 10 + int(worker.removeprefix("gw"))
    for number in (*range(first, 20), *range(1, first)):
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0slurm-cluster-{number}")  # leaves no file, whoever ends and how
            except OSError:
                continue
            if not Path(f"/sys/class/net/slbr{number}").exists():  # else one booted by hand
                yield number
                return
    raise AssertionError("all 19 numbers of clusters are taken on this machine")


def _titles() -> Iterator[tuple[str, str]]:
    """(pid, command line) of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            yield folder.name, (folder / "cmdline").read_text("utf-8", "replace")


def _network_of(pid: str) -> str:
    """The network namespace of a process, empty when it is gone; each node has its own."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""
