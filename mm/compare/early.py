"""A comparison that ends early, by a failure or a request: why, as its ranks agree on it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from mm.compare.result import Stopped
from mm.errors import PolyrankError
from mm.ranks.launch import RankInfo, patience

KEY = "compare/stopped"  # of the job's store, written once
LONG_S = 2.0  # an error of which so much patience is due comes from a rank that has gone, and has no reason


def reason(error: BaseException, rank: RankInfo, name: str, file: str, number: int) -> Stopped:
    """Why the comparison ends, as the first rank that knows has told it; every rank that fails calls this.

    name, file: of the layout that ran. number: of the round, from 1. Where only broken communication is
    known, or a request has come, rank is None.
    """
    interrupted = isinstance(error, KeyboardInterrupt)
    why = "interrupted" if interrupted else str(error) or type(error).__name__
    if not isinstance(error, PolyrankError | KeyboardInterrupt):
        why = f"{type(error).__name__}: {why}".splitlines()[0]
    wait = patience(error)
    time.sleep(wait)
    unknown = interrupted or wait >= LONG_S
    own = Stopped(name, file, number, None if unknown else rank.rank, why, interrupted)
    if rank.store is None:
        return own
    try:
        if unknown and not rank.store.check([KEY]):
            return own
        first = rank.store.compare_set(KEY, "", json.dumps(asdict(own)))
    except Exception:  # the store is gone too, for any reason; what this rank knows is not
        return own
    return Stopped(**json.loads(first.decode()))
