"""Put the results of a job array's tasks together, once all of them are there.

Each task writes a file of its own; whichever is last joins them in input order. Knows no pipeline.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from manager.slurm.pipeline_job import part_path
from proto.errors import Error


def join_parts(output: Path, count: int) -> bool:
    """Join the parts of `output`, if all are there and nobody has done it yet.

    Returns:
        Whether this call did.
    Raises:
        Error: it cannot be written; all parts are kept.
    """
    parts = [part_path(output, index, count) for index in range(count)]
    writing = output.with_name(output.name + ".joining")
    try:
        with writing.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not all(part.exists() for part in parts):
                return False
            lines = [line for part in parts for line in part.read_bytes().splitlines(True)]
            lines.sort(key=lambda line: int(json.loads(line)["index"]))
            file.truncate(0)
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
            writing.replace(output)
            for part in parts:
                part.unlink()
            return True
    except OSError as exc:
        raise Error(
            f"cannot join the parts into {output}: {exc.strerror}; they are kept, as {parts[0]}"
        ) from exc
    finally:
        if not any(part.exists() for part in parts) or output.exists():
            writing.unlink(missing_ok=True)
