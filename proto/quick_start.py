"""Start and leave sooner: the garbage collector out of the way of large imports, and of the end.

torch and transformers make a million objects that live as long as the process. Python's collector
looks for cycles among them over and over while they are imported, and once more at the end, when
the system takes all memory back anyhow: two seconds in four, on a fast machine.
"""

from __future__ import annotations

import atexit
import gc
from typing import Final

# Between two searches; Python's own is 700. What is in cycles is kept longer for it: some 200 bytes
# each x 20,000 = 4 MB.
NEW_OBJECTS: Final = 20_000


def quick_start() -> None:
    """Call it first, once in a process."""
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(settle)


def settle() -> None:
    """What there is now stays to the end: do not search it any more.

    A full search of torch's and transformers' objects holds everything up for 0.15 s on a fast
    machine, more than a second on a small board: in the middle of somebody's stream.
    """
    gc.freeze()
