"""What does TLS cost a decode step? One hop of `hop.py`, with it and without it, in turns.

    python bench/tls.py [--hidden 2048] [--steps 3000] [--rounds 3] [--quick] [--json FILE]

A hop has two links, one into the worker and one out of it; each encrypts the frame at one end and
decrypts it at the other. So a chain of P workers, which has P + 1 links, pays half of what is added
here P + 1 times a step. Loopback costs less than a cable, and nothing is computed here: beside a
real step the ratio is far smaller, and the microseconds are what they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.hop import measure_worker, percentile
from bench.measuring import command
from bench.measuring.machine import description
from manager.certificates import make_certificates
from proto.tls import TlsFiles

LINKS: Final = 2  # of a hop


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, bfloat16")
    parser.add_argument("--steps", type=int, default=3000, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turns")
    args = parser.parse_args()
    rounds, steps = (1, 300) if args.quick else (args.rounds, args.steps)
    result = measure(args.hidden, rounds, steps)
    print_table(result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(hidden_size: int, rounds: int, steps: int) -> dict[str, Any]:
    """Both, in turns, and what lies between them."""
    trips: dict[str, list[float]] = {"plain": [], "tls": []}
    frame_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        files = certificates(Path(folder))
        for _ in range(rounds):
            for name, with_files in (("plain", None), ("tls", files)):
                found, frame_bytes, _ = measure_worker(hidden_size, steps, with_files)
                trips[name] += found
    p50, p95 = (
        {name: percentile(sorted(found), percent) for name, found in trips.items()}
        for percent in (50, 95)
    )
    added_us = round(p50["tls"] - p50["plain"], 1)
    return {
        "machine": description(),
        "hidden_size": hidden_size,
        "frame_bytes": frame_bytes,
        "rounds": rounds,
        "steps": steps,
        "plain_us": {"p50": p50["plain"], "p95": p95["plain"]},
        "tls_us": {"p50": p50["tls"], "p95": p95["tls"]},
        "ratio": round(p50["tls"] / p50["plain"], 3),
        "added_us": added_us,
        "added_us_per_link": round(added_us / LINKS, 1),
    }


def certificates(folder: Path) -> TlsFiles:
    """One for this machine, by an authority of its own."""
    make_certificates(folder, ["127.0.0.1"], days=2)
    return TlsFiles(
        cert=folder / "127.0.0.1.pem", key=folder / "127.0.0.1.key", ca=folder / "ca.pem"
    )


def print_table(result: dict[str, Any]) -> None:
    print(
        f"one hop of a decode step, hidden size {result['hidden_size']}, "
        f"{result['frame_bytes']} bytes a frame, {result['rounds']} x {result['steps']} steps"
    )
    print(f"{'':8}{'p50':>10}{'p95':>10}  microseconds, round trip")
    for name in ("plain", "tls"):
        found = result[f"{name}_us"]
        print(f"{name:8}{found['p50']:>10}{found['p95']:>10}")
    print(
        f"TLS adds {result['added_us']} microseconds to two links, "
        f"{result['added_us_per_link']} to each: {result['ratio']} times the round trip"
    )


if __name__ == "__main__":
    command.run(main)
