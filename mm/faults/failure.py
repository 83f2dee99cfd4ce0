"""Why a job ends, as all of its ranks read it: one key of the job's store, which is written once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

KEY, NONE = "failed", "-"
LAUNCHER = -1  # as who tells


@dataclass(frozen=True)
class Failure:
    """text: the message, which names the rank. rank: who failed, None where that is not one rank. code: of
    the job. teller: the rank that prints the text, or LAUNCHER. hangs: the rank did not end by itself."""

    text: str
    rank: int | None
    code: int
    teller: int
    hangs: bool = False


def prepare(store: Store) -> None:
    """Make the key, so that reading it does not wait. Every rank may call this."""
    store.compare_set(KEY, "", NONE)


def tell(store: Store, failure: Failure) -> Failure:
    """Make a failure the job's, unless there is one; returns the job's."""
    return read(store.compare_set(KEY, NONE, json.dumps(asdict(failure)))) or failure


def read(value: bytes) -> Failure | None:
    """The failure that a value of the key tells; None where nothing has failed."""
    text = value.decode()
    return Failure(**json.loads(text)) if text.startswith("{") else None
