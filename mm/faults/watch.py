"""What a rank knows of the others by their posts, and how the one that judges comes to a verdict."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mm.faults.blame import SILENT_S, Post, Seen, Verdict, blame
from mm.faults.record import shown
from mm.faults.stacks import read, state_of

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

JUDGE_S = 4.5  # longest time for a verdict: a rank falls silent within it
LEAD = 0  # the rank that reads all posts, as long as it lives


@dataclass(frozen=True)
class About:
    """Where a rank is. host: as stacks.this_machine() has it. name: of the host, for people. stacks, window:
    descriptors of the files that have its stacks and what it does now."""

    host: str
    pid: int
    stacks: int
    window: int
    name: str = ""

    def dump(self) -> str:
        """As the store has it."""
        return json.dumps(asdict(self))


def post_key(rank: int) -> str:
    """Where a rank posts what it does."""
    return f"post/{rank}"


def about_key(rank: int) -> str:
    """Where a rank tells where it is."""
    return f"about/{rank}"


class Watch:
    """The posts that this rank reads: those of all ranks on the lead, of the lead alone on others."""

    def __init__(self, store: Store, rank: int, world: int, about: About) -> None:
        self._store, self.rank, self.world, self._host = store, rank, world, about.host
        self.abouts: dict[int, About] = {rank: about}
        self._posts: dict[int, tuple[Post, float]] = {}  # with when it was new
        self._ended: dict[int, float] = {}  # when it was found
        self._since = time.monotonic()
        for r in range(world) if rank == LEAD else (rank, LEAD):
            store.compare_set(post_key(r), "", "-")
        store.set(about_key(rank), about.dump())

    def read(self, ranks: Sequence[int], more: str) -> bytes:
        """Read the posts of some ranks; returns the value of one more key. One message."""
        values = self._store.multi_get([more, *map(post_key, ranks)])
        now = time.monotonic()
        for r, value in zip(ranks, values[1:], strict=True):
            post = Post.parse(value.decode())
            before = self._posts.get(r)
            if post is not None and (before is None or before[0].number != post.number):
                self._posts[r] = post, now
        return bytes(values[0])

    @property
    def mine(self) -> Sequence[int]:
        """The ranks whose posts this rank reads every second."""
        return range(self.world) if self.rank == LEAD else (LEAD,)

    def calls(self) -> bool:
        """Whether some rank that this one reads asks who is to blame."""
        return any(post.calls for post, _ in self._posts.values())

    def callers(self) -> str:
        """Which ranks ask, where they are and why."""
        asking = [(r, post) for r, (post, _) in sorted(self._posts.items()) if post.calls]
        return "; ".join(f"rank {r} in {post.at}: {post.calls}" for r, post in asking[:8])

    def shift(self, seconds: float) -> None:
        """This process was stopped for so long: the others have not been silent in that time."""
        self._posts = {
            r: (post, min(at + seconds, time.monotonic())) for r, (post, at) in self._posts.items()
        }
        self._since = time.monotonic()

    def lead_is_lost(self) -> bool:
        """Whether the lead no longer judges: it has ended, has left, or is silent."""
        if self.rank == LEAD or LEAD not in self._posts:
            return False
        seen = self._seen(LEAD)
        return bool(seen.ended) or seen.stopped or seen.post.done or seen.silent_s >= SILENT_S

    def judge(self, failed: Callable[[], bool]) -> Verdict | None:
        """Who is to blame, or None where `failed` holds meanwhile. It is asked often; takes up to JUDGE_S."""
        # A rank that has not read all posts before must read them twice to see who is silent.
        began, everyone = time.monotonic(), range(self.world)
        for r in everyone:
            self._store.compare_set(post_key(r), "", "-")
        while not failed():
            self.read(everyone, post_key(self.rank))
            verdict = blame([self._seen(r) for r in everyone if r in self._posts])
            spent = time.monotonic() - began
            known = self.rank == LEAD or verdict.rank == LEAD or spent > SILENT_S
            informed = known and time.monotonic() - self._since > SILENT_S
            if (verdict.sure and verdict.rank is not None and informed) or spent > JUDGE_S:
                return verdict
            time.sleep(0.25)
        return None

    def _seen(self, rank: int) -> Seen:
        post, at = self._posts[rank]
        silent = 0.0 if rank == self.rank else max(0.0, time.monotonic() - at)
        about = self.about(rank)
        state = "S"
        if about is not None and about.host == self._host and sys.platform == "linux" and not post.done:
            state = state_of(about.pid)
        if state in ("", "Z"):
            self._ended.setdefault(rank, time.monotonic())
        if silent >= SILENT_S and about is not None and about.host == self._host:
            post = replace(post, at=shown(read(about.pid, about.window)) or post.at)
        ended = "ended without a word" if rank in self._ended else ""
        elsewhere = about.name if about is not None and about.host != self._host else ""
        return Seen(rank, post, silent, ended, state == "T", elsewhere)

    def about(self, rank: int) -> About | None:
        """Where a rank is, once it has told."""
        if rank not in self.abouts:
            # Reads the key too, and does not wait where there is none.
            text = self._store.compare_set(about_key(rank), "", "-").decode()
            if not text.startswith("{"):
                return None
            self.abouts[rank] = About(**json.loads(text))
        return self.abouts[rank]
