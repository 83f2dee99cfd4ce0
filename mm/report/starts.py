"""What a run was started with: one object a start in starts.jsonl of its folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path

from mm.data.remote.urls import scrub
from mm.ranks.launch import RankInfo
from mm.report.host import host_facts

STARTS = "starts.jsonl"


def write_start(run_dir: Path, rank: RankInfo, backend: str, first: int) -> None:
    """Add this start of a run; one from step 0 begins the file anew. first: steps done before it.

    The command is that of this process. Passwords in its URLs are left out.
    """
    python, *arguments = sys.orig_argv
    record = {
        "step": first,
        "command": scrub(shlex.join([Path(python).name, *arguments])),
        "folder": os.getcwd(),
        "ranks": rank.world,
        "ranks_a_node": rank.node_size or rank.world,
        "host": platform.node(),
        **host_facts(rank.device, backend),
    }
    with (run_dir / STARTS).open("a" if first else "w") as file:
        file.write(json.dumps(record) + "\n")
