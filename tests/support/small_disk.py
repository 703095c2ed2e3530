"""A disk of a few kilobytes, for what happens when one is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

# The mount is seen by this command alone, and goes with it.
_MOUNTED = 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && exec "$@"'


def with_small_disk(
    size: str, folder: Path, command: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, for which `folder` is a file system of this size ("300k")."""
    namespace = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    )
    return subprocess.run(
        [*namespace, "sh", "-c", _MOUNTED, "sh", size, str(folder), *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )


@cache
def why_no_small_disk() -> str | None:
    """Why this machine lets nobody mount one; None where it does."""
    try:
        done = with_small_disk("64k", Path("/mnt"), ["true"])
    except OSError as exc:
        return f"needs unshare(1): {exc.strerror}"
    return None if done.returncode == 0 else f"cannot mount a tmpfs: {done.stderr.strip()}"
