"""Lock a run's folder, so that one run at a time writes to it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mm.errors import Refused


def lock(run_dir: Path) -> int:
    """Lock a run's folder until the returned file descriptor is closed or the process ends.

    Raises Refused where another process holds the lock. On a file system without locks this does nothing.
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
