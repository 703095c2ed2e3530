"""The cores of this machine, divided."""

from __future__ import annotations

import os

from proto.cores import cores_each


def test_processes_share_this_processs_cores_and_each_has_one():
    assert cores_each(1) == len(os.sched_getaffinity(0))
    assert cores_each(1000) == 1
