"""What every measurement's command line has in common: options, and errors as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from proto.errors import Error

ALL_BITS: Final = ("bf16", "int8", "int4")


def parser(doc: str | None, *, bits: str | None = None) -> argparse.ArgumentParser:
    """--quick and --json; with `bits` also --bits, with these at first."""
    made = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="does it run? smaller, and once")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    if bits is not None:
        made.add_argument("--bits", default=bits, help=f"which of {','.join(ALL_BITS)}")
    return made


def listed(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """Names with commas between them, each of those that are known."""
    names = [it for it in text.split(",") if it]
    for name in names:
        if name not in known:
            raise SystemExit(f"{option} {name}: it takes {', '.join(known)}, with commas.")
    return names


def run(main: Callable[[], None]) -> None:
    """Run it; what goes wrong is one sentence, and Ctrl-C an end."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing that is measured needs a download
    try:
        main()
    except Error as exc:
        sys.exit(f"{Path(sys.argv[0]).name}: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
