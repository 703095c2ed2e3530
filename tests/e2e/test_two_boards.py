"""Two network namespaces stand for two boards; the commands are README.md's own, as they stand.

Each board has its own address, loopback and folder. `scp` alone is played: there is no SSH server
between namespaces, so a file of that name on PATH copies into the other board's folder.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- ([\w ]+): (\w+) -->\n```\w+\n(.*?)```", re.DOTALL)
Blocks = dict[tuple[str, str], str]  # (place, what) -> commands
NUMBERS = itertools.count(1, 2)  # of namespaces
COMMAND_S = 240  # importing torch on a busy machine, twice
pytestmark = pytest.mark.timeout(900)  # several commands to a test


@dataclass(frozen=True)
class Board:
    """One network namespace with an address and a home folder."""

    number: int
    namespace: str
    address: str
    home: Path
    path: str  # PATH

    @property
    def name(self) -> str:
        return f"board {self.number}"

    @property
    def folder(self) -> Path:
        return self.home / "comboio"

    def words(self, script: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, "bash", "-euo", "pipefail", "-c", script]

    @property
    def environ(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("COMBOIO_")}
        return kept | {"HOME": str(self.home), "PATH": self.path}

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(script),
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def received_bytes(self) -> int:
        return int(self.run("cat /sys/class/net/eth0/statistics/rx_bytes").stdout)


@dataclass(frozen=True)
class Chain:
    """Two boards with a running worker each, and what the workers said when they were ready."""

    boards: tuple[Board, Board]
    ready: tuple[str, str]


def readme_blocks() -> Blocks:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return {(place, what): block.strip() for place, what, block in BLOCK.findall(text)}


def listen_address(block: str) -> str:
    found = re.search(r"--listen (\d+\.\d+\.\d+\.\d+):\d+", block)
    assert found, f"no --listen ADDRESS:PORT in {block!r}"
    return found[1]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return readme_blocks()


@pytest.fixture(scope="module")
def boards(blocks, tmp_path_factory) -> Iterator[tuple[Board, Board]]:
    with two_boards(blocks, tmp_path_factory.mktemp("boards")) as made:
        yield made


@pytest.fixture
def new_boards(blocks, tmp_path) -> Iterator[tuple[Board, Board]]:
    """Two others, where nothing runs yet."""
    with two_boards(blocks, tmp_path) as made:
        yield made


@contextmanager
def two_boards(blocks: Blocks, base: Path) -> Iterator[tuple[Board, Board]]:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    addresses = [listen_address(blocks[f"board {number}", "worker"]) for number in (1, 2)]
    with ExitStack() as stack:
        first = next(NUMBERS)
        names = [f"comboio-{os.getpid()}-{number}" for number in (first, first + 1)]
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        # The ends live inside the namespaces and go away with them.
        ends = ["link", "add", "eth0", "netns", names[0], "type", "veth"]
        ip(*ends, "peer", "name", "eth0", "netns", names[1])
        made = []
        for number, name, address in zip((1, 2), names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            home = base / f"board{number}"
            (home / "comboio").mkdir(parents=True)
            path = os.pathsep.join([str(base / "bin"), commands_folder(), os.environ["PATH"]])
            made.append(Board(number, name, address, home, path))
        play_scp(base / "bin", made[1])
        yield made[0], made[1]


@pytest.fixture(scope="module")
def chain(blocks, boards) -> Iterator[Chain]:
    shared = boards[0].run(blocks["board 1", "once"])
    assert shared.returncode == 0, shared.stderr
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(board, blocks[board.name, "worker"])) for board in boards
        ]
        ready = [first_line(process, board) for process, board in zip(workers, boards, strict=True)]
        yield Chain(boards, (ready[0], ready[1]))


def test_the_secret_is_for_its_owner_only_on_both_boards(chain):
    secrets = [board.folder / "comboio.secret" for board in chain.boards]
    assert secrets[0].read_bytes() == secrets[1].read_bytes()
    assert [stat.S_IMODE(secret.stat().st_mode) for secret in secrets] == [0o600, 0o600]


def test_each_board_says_which_half_it_holds(chain):
    for board, line in zip(chain.boards, chain.ready, strict=True):
        assert line.startswith(f"ready {board.address}:7710 section ")
    spans = [re.search(r" layers (\d+):(\d+) of (\d+) ", line) for line in chain.ready]
    assert all(spans), chain.ready
    first, second = ([int(part) for part in span.groups()] for span in spans)
    assert first[0] == 0
    assert first[1] == second[0]
    assert second[1] == second[2]


def test_manager_workers_lists_both_boards(chain, blocks):
    shown = chain.boards[0].run(blocks["board 1", "manager"].splitlines()[0])
    assert shown.returncode == 0, shown.stderr
    for board in chain.boards:
        assert f"{board.address}:7710" in shown.stdout


def test_both_boards_write_what_one_machine_writes(chain, blocks):
    first, second = chain.boards
    command = blocks["board 1", "manager"].splitlines()[-1]
    before = second.received_bytes()
    across = first.run(command)
    received_bytes = second.received_bytes() - before
    alone = first.run('manager generate --spawn 1 "Return a list of"')
    from_the_second = second.run(command)

    for done in (across, alone, from_the_second):
        assert done.returncode == 0, done.stderr
    assert len(across.stdout.split()) > 5
    assert across.stdout == alone.stdout == from_the_second.stdout
    # Hidden states went over the cable: hundreds of bytes a token, and a token is a few letters.
    assert received_bytes > 50 * len(across.stdout)


@pytest.mark.parametrize("secret", ["none", "another"])
def test_without_the_secret_a_manager_is_turned_away_in_one_sentence(chain, blocks, secret):
    board = chain.boards[1]
    (board.folder / "another.secret").write_text("0123456789abcdef0123456789abcdef\n")
    (board.folder / "another.secret").chmod(0o600)
    asked = blocks["board 1", "manager"].splitlines()[-1]
    option = "" if secret == "none" else "--secret-file another.secret"
    answer = board.run(asked.replace("--secret-file comboio.secret", option))
    assert answer.returncode in (1, 2)
    assert answer.stdout == ""
    assert "secret" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_open_port_without_a_secret_is_refused_with_the_way_out(boards, blocks):
    block = blocks["board 1", "worker"].replace(" --secret-file comboio.secret", "")
    answer = boards[0].run(block)
    assert answer.returncode == 2
    assert "--secret-file" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_with_the_readmes_certificates_nothing_travels_in_the_clear(new_boards, blocks):
    """No secret is there, and the text that the boards exchange is not to be seen on the cable."""
    first, second = boards = new_boards
    made = first.run(blocks["board 1 encrypted", "once"])
    assert made.returncode == 0, made.stderr
    own = {it.name for it in second.folder.iterdir() if it.suffix in (".pem", ".key")}
    assert own == {"ca.pem", "192.168.1.22.pem", "192.168.1.22.key"}  # no key of the authority's
    assert stat.S_IMODE((second.folder / "192.168.1.22.key").stat().st_mode) == 0o600
    (first.folder / "comboio.toml").write_text(blocks["board 1 encrypted", "settings"])
    shown_command, generate = blocks["board 1 encrypted", "manager"].splitlines()
    with ExitStack() as stack:
        for board in boards:
            command = blocks[f"{board.name} encrypted", "worker"]
            first_line(stack.enter_context(worker(board, command)), board)
        seen = stack.enter_context(listening(second))
        shown, across = first.run(shown_command), first.run(generate)
        cable = seen()
        without = second.run("manager workers --workers 192.168.1.21:7710")
    alone = first.run('manager generate --spawn 1 "Return a list of"')
    for done in (shown, across, alone):
        assert done.returncode == 0, done.stderr
    assert all(f"{board.address}:7710" in shown.stdout for board in boards)
    assert across.stdout == alone.stdout
    assert cable.count(b"\x17\x03\x03") > 5  # records of TLS
    assert b"CMBO" not in cable  # with which a frame of ours begins
    assert without.returncode in (1, 2)
    assert "--tls-cert" in without.stderr and "Traceback" not in without.stderr


def test_the_readmes_commands_for_one_machine_work_with_default_addresses(boards, blocks):
    board = boards[1]  # a loopback of its own, where nothing else listens
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(board, command))
            for command in blocks["one machine", "workers"].splitlines()
        ]
        ready = [first_line(process, board) for process in workers]
        shown, generated = (
            board.run(command) for command in blocks["one machine", "manager"].splitlines()
        )
        (board.folder / "program.py").write_text(blocks["one machine", "program"])
        program = board.run("python program.py")
    assert [line.split()[1] for line in ready] == ["127.0.0.1:7710", "127.0.0.1:7711"]
    for done in (shown, generated, program):
        assert done.returncode == 0, done.stderr
    assert "127.0.0.1:7711" in shown.stdout
    assert generated.stdout.strip()
    assert program.stdout.strip() == generated.stdout.strip()


@contextmanager
def listening(board: Board) -> Iterator[Callable[[], bytes]]:
    """What reaches a board through its cable, from now on until it is asked for."""
    script = (
        "import select, socket, sys\n"
        "cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))\n"
        "cable.bind(('eth0', 0))\n"
        "print('listening', flush=True)\n"
        "while True:\n"
        "    ready, _, _ = select.select([cable, sys.stdin], [], [])\n"
        "    if sys.stdin in ready:\n"
        "        break\n"
        "    sys.stdout.buffer.write(cable.recv(65536))\n"
        "sys.stdout.buffer.flush()\n"
    )
    with (
        tempfile.TemporaryFile() as heard,
        subprocess.Popen(
            ["ip", "netns", "exec", board.namespace, sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=heard,
        ) as process,
    ):
        assert process.stdin is not None
        while not os.fstat(heard.fileno()).st_size:
            assert process.poll() is None
            time.sleep(0.01)  # a file tells nobody that it grew

        def seen() -> bytes:
            process.stdin.close()
            assert process.wait(30) == 0
            heard.seek(0)
            return heard.read()

        try:
            yield seen
        finally:
            process.kill()


# --- boards, links and processes ------------------------------------------------------------


def why_no_namespaces() -> str | None:
    """Why this machine can hold no network namespaces, or None where it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux network namespaces"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the command ip (apt install iproute2)"
    name = f"comboio-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"cannot make network namespaces here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def commands_folder() -> str:
    """Where this environment's `worker` and `manager` are, as `. .venv/bin/activate` has it."""
    folder = Path(sys.executable).parent
    missing = [name for name in ("worker", "manager") if not (folder / name).is_file()]
    assert not missing, f"{folder} lacks {missing}: pip install -e ."
    return str(folder)


def play_scp(folder: Path, target: Board) -> None:
    """Put an `scp` into `folder` that copies to `target`'s home."""
    folder.mkdir()
    script = folder / "scp"
    script.write_text(
        "#!/bin/sh -eu\n"
        f'case "$3" in {target.address}:*) ;; *) echo "unknown host: $3" >&2; exit 1;; esac\n'
        f'exec cp "$1" "$2" "{target.home}/${{3#*:}}"\n'
    )
    script.chmod(0o755)


@contextmanager
def worker(board: Board, block: str) -> Iterator[subprocess.Popen[str]]:
    """The worker of a board; afterwards it leaves on SIGTERM with exit code 0."""
    with (
        (board.folder / "worker.log").open("a") as log,
        subprocess.Popen(
            board.words(block),
            cwd=board.folder,
            env=board.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                code = process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert code == 0, f"worker of board {board.number} left with {code}: {said(board)}"


def first_line(process: subprocess.Popen[str], board: Board) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().rstrip()
    assert line, f"worker of board {board.number} ended before it was ready: {said(board)}"
    return line


def said(board: Board) -> str:
    return (board.folder / "worker.log").read_text()[-2000:]
