"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mm.errors import Refused


def lock(run_dir: Path) -> int:
    """Keep a run's folder to this process until the returned descriptor is closed, or the process ends.

    Raises Refused where another process has it. File systems without locks keep nothing out.
    """
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Refused(f"another run is writing to run.dir {run_dir}; needed: a folder of its own") from None
    except OSError:
        pass
    return handle
