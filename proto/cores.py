"""How many processor cores there are for each of several processes of this machine."""

from __future__ import annotations

import os


def cores_each(num_processes: int) -> int:
    """This process's cores, divided; at least one.

    Processes that each compute on all cores wait for one another at every matrix product, many
    times longer than they compute.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // num_processes)
