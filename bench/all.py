"""All measurements in one go, and the table of targets at the end. `make bench` calls this.

    python bench/all.py [--quick] [--only compare,start] [--budget MINUTES] [--output build/bench]

Each part is a file of this folder in a process of its own, so that one that fails does not take the
others with it. Parts run in the order of the list until the budget is used up; what is left out is
said with its command. The folder of `--output` gets all.json, the parts' own JSON, and the charts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.machine import description
from bench.measuring.rounds import say
from bench.measuring.verdicts import FORMAT, Row, row_of, show
from manager.bench_load import BUSY
from proto.errors import Error

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
BUDGET_MIN: Final = 20.0
# A part that hangs is ended when it has taken so many times what it should.
PATIENCE: Final = 6.0


@dataclass(frozen=True)
class Part:
    """One file of this folder, with its options."""

    name: str
    script: str
    words: tuple[str, ...] = ()
    quick_words: tuple[str, ...] = ("--quick",)  # instead
    minutes: float = 1.0  # on two quiet cores, about; models written already
    quick_minutes: float = 0.5
    has_rows: bool = True  # it writes its rows to --json; else it only prints
    has_charts: bool = False

    def command(self, folder: Path, *, quick: bool) -> list[str]:
        words = [sys.executable, str(HERE / self.script), *self.own_words(quick=quick)]
        if self.has_rows:
            words += ["--json", str(folder / f"{self.name}.json")]
        if self.has_charts:
            words += ["--charts", str(folder)]
        return words

    def own_words(self, *, quick: bool) -> tuple[str, ...]:
        return self.quick_words if quick else self.words


LIGHT: Final = ("--rounds", "1", "--streams", "1,8", "--against", "layer,tensor,whole")
PARTS: Final = (
    Part(
        "compare", "compare.py", ("--rounds", "2"), ("--quick", "--bits", "int4", "--streams", "8"),
        minutes=9.0, quick_minutes=1.0, has_charts=True,
    ),
    Part(
        "bandwidth", "bandwidth.py", ("--rounds", "3"), ("--quick", "--bits", "int4"),
        minutes=1.5, quick_minutes=0.3,
    ),
    Part("overhead", "overhead.py", (), ("--quick", "--bits", "int4"), minutes=0.8,
         quick_minutes=0.2),
    Part("start", "starting.py", ("--rounds", "2"), ("--quick", "--bits", "int4"), minutes=1.5,
         quick_minutes=0.5),
    Part("prefill", "prefill.py", ("--rounds", "1"), ("--quick", "--bits", "int4"), minutes=2.5,
         quick_minutes=0.4),
    Part("context", "long_context.py", minutes=1.5, quick_minutes=0.3),
    Part("board", "board.py", ("--rounds", "1"), ("--quick",), minutes=2.5, quick_minutes=2.0),
    Part("compare-phi3", "compare.py", ("--shape", "phi3", *LIGHT), minutes=4.5, quick_minutes=3.0),
    Part("compare-gpt2", "compare.py", ("--shape", "gpt2", *LIGHT), minutes=3.0, quick_minutes=2.0),
    Part("compare-moe", "compare.py", ("--shape", "moe", *LIGHT), minutes=3.0, quick_minutes=2.0),
    Part("kernels", "kernels.py", (), ("--rounds", "1", "--working-set", "0.25"), minutes=1.0,
         quick_minutes=0.2, has_rows=False),
    Part("attention", "attention.py", (), (), minutes=1.0, has_rows=False),
    Part("hop", "hop.py", (), ("--steps", "1000"), minutes=0.3, quick_minutes=0.2, has_rows=False),
    Part("tls", "tls.py", (), ("--quick",), minutes=1.0, quick_minutes=0.4, has_rows=False),
    Part("serve", "serve.py", ("--rounds", "3"), ("--quick",), minutes=1.0, quick_minutes=0.5),
    Part("memory", "memory.py", (), (), minutes=0.7, has_rows=False),
    Part("quality", "quality.py", (), (), minutes=3.0, quick_minutes=3.0, has_rows=False),
    Part("sibling", "pipeline.py", (), ("--rounds", "1", "--streams", "1,8"), minutes=1.0,
         quick_minutes=0.5, has_rows=False),
)  # fmt: skip
QUICK_BUDGET_MIN: Final = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="do they run? in two to three minutes")
    parser.add_argument("--only", help=f"of {','.join(it.name for it in PARTS)}; in any time")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="default: 20; quick: 3")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    args = parser.parse_args()
    names = tuple(it.name for it in PARTS)
    chosen = names if args.only is None else command.listed(args.only, names, "--only")
    parts = [it for it in PARTS if it.name in chosen and (HERE / it.script).is_file()]
    budget_min = args.budget or (QUICK_BUDGET_MIN if args.quick else BUDGET_MIN)
    if args.only is not None and args.budget is None:
        budget_min = float("inf")
    folder = _made(args.output)
    done, notes = run_all(parts, folder, budget_min, quick=args.quick)
    rows = [row_of(values) for content in done.values() for values in content["rows"]]
    notes = [*dict.fromkeys(it for content in done.values() for it in content["notes"]), *notes]
    notes += _busy(done)
    machine = description()
    show(rows, title=f"targets; {machine['cpu']}, {machine['cores']} cores", notes=notes)
    _write(folder / "all.json", rows, notes, done)
    print(f"figures and charts are in {folder}")
    sys.exit(1 if any(note.startswith("FAILED") for note in notes) else 0)


def run_all(
    parts: Sequence[Part], folder: Path, budget_min: float, *, quick: bool
) -> tuple[dict[str, Any], list[str]]:
    """The parts' JSON by name, and sentences on those that failed or were left out."""
    done, notes = dict[str, Any](), list[str]()
    begun_s = time.monotonic()
    for part in parts:
        left_min = budget_min - (time.monotonic() - begun_s) / 60
        minutes = part.quick_minutes if quick else part.minutes
        shown = shlex.join(["python", f"bench/{part.script}", *part.own_words(quick=quick)])
        if minutes > left_min:
            notes.append(f"left out, as the time is used up: {shown} (about {minutes:g} min)")
            continue
        say(f"== {shown}")
        why = _run(part, folder, minutes, quick=quick)
        if why:
            notes.append(f"FAILED: {shown}: {why}")
            continue
        if part.has_rows:
            done[part.name] = json.loads((folder / f"{part.name}.json").read_text())
    return done, notes


def _run(part: Part, folder: Path, minutes: float, *, quick: bool) -> str | None:
    """Run one; why it failed. Its own table goes to stdout."""
    try:
        code = subprocess.run(
            part.command(folder, quick=quick),
            check=False,
            timeout=60 * PATIENCE * max(1.0, minutes) + 300,
        ).returncode
    except subprocess.TimeoutExpired as exc:
        return f"it did not end within {exc.timeout:.0f} s"
    return f"it ended with code {code}, see above" if code else None


def _busy(done: dict[str, Any]) -> list[str]:
    shares = {name: content["load"]["others_share_max"] for name, content in done.items()}
    busy = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > BUSY]
    return [f"CPU that other processes took at most: {', '.join(busy)}"] if busy else []


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Error(f"--output {folder} cannot be made: {exc.strerror}.") from exc
    return folder.resolve()


def _write(path: Path, rows: Sequence[Row], notes: Sequence[str], done: dict[str, Any]) -> None:
    content = {
        "format": FORMAT,
        "machine": description(),
        "rows": [row.as_json() for row in rows],
        "notes": list(notes),
        "parts": done,
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise Error(f"{path} cannot be written: {exc.strerror}.") from exc


if __name__ == "__main__":
    command.run(main)
