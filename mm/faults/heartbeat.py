"""A rank's heartbeat: two threads that post what it does, hear of failures, and end it where it cannot do so.

One thread looks at the rank and never blocks; the other talks with the job's store. A rank makes two requests
a second whatever the number of ranks, but for the lead, which reads all posts in one.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from mm.errors import PolyrankError, Told
from mm.faults import failure, folder
from mm.faults.blame import Post
from mm.faults.failure import Failure
from mm.faults.record import FlightRecord, Window
from mm.faults.sites import broke_at_exchange, site_of
from mm.faults.stacks import Stacks, this_machine
from mm.faults.watch import LEAD, About, Watch, post_key

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

BEAT_S = 1.0
SLEPT_S = 5.0  # a gap between two beats that only a stopped process or machine has
JOIN_S = 5.0  # for the heartbeat's threads: one may still be ending a rank that hangs
GRACE_S = 1.5  # seconds that a rank has to end by itself once the job has failed
VERDICT_S = 7.0  # longest wait for a verdict of another rank
EXIT_S = 9.0  # beyond run.timeout_s: then C code ends a rank whose threads cannot run
LOST_S = 5.0  # without a store: a launcher that ends may leave a rank that ends too


class Place(NamedTuple):
    """A rank of the job. lead_here: it speaks for its machine where the store is lost. timeout_s: of the
    config's run. store: its address. agent: a process that starts the ranks again; without it, this one must
    not go on. 0: none."""

    rank: int
    world: int
    lead_here: bool
    timeout_s: float
    store: str = ""
    agent: int = 0


class Heartbeat:
    """Inside, this rank's heartbeat goes. An error that leaves telling() is told by one rank of the job.

    connect: makes a connection to the job's store of this thread's own. run_dir: of the run, or of its first
    stage; may be changed. last: what to do before this process ends although its main thread hangs.
    """

    def __init__(
        self,
        place: Place,
        connect: Callable[[], Store],
        record: FlightRecord,
        run_dir: Path,
        last: Callable[[], object] = lambda: None,
    ) -> None:
        self.place, self.record, self.run_dir = place, record, run_dir
        self._connect, self._last = connect, last
        self._thread = threading.get_ident()
        self._wake, self._over, self._heard = threading.Event(), threading.Event(), threading.Event()
        self._failure: Failure | None = None
        self._post = Post(0, str(record))
        self._calls = ""
        self._still: tuple[object, float] = (None, time.monotonic())
        self._answered = time.monotonic()
        self._lost = ""
        self._parting: Failure | None = None  # of a rank that must not go on
        self._slept = 0.0
        # A rank that is alone makes nobody wait: one that was suspended for long may go on.
        self._stacks = Stacks(place.timeout_s + EXIT_S, ends=place.world > 1)
        self._window = record.window = Window()
        self._watch: Watch | None = None
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat-{name}", daemon=True)
            for name, target in (("guard", self._guard), ("post", self._talk))
        ]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(JOIN_S)
        self._stacks.close()
        self.record.window = None
        self._window.close()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error that leaves what is inside becomes the job's. What follows then has GRACE_S to end."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._tell(error)
        finally:
            self.record.forget()
            self.record.phase = "ending"

    # errors of this rank, in its main thread

    def _tell(self, error: BaseException) -> NoReturn:
        """Make an error of this rank the job's, or find out whose fault it is. Raises Told."""
        where = str(self.record)
        if broke_at_exchange(error):
            self._calls = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._wake.set()
            self._heard.wait(VERDICT_S)
        if self._failure is None:
            own = Failure(
                folder.message(error, self.place.rank, where, self._acts()),
                self.place.rank,
                error.exit_code if isinstance(error, PolyrankError) else 1,
                self.place.rank,
            )
            self._failure = self._announce(own)
            if self._failure == own:
                unknown = not isinstance(error, PolyrankError)
                trace = "".join(traceback.format_exception(error))
                at = self._save(trace)
                self._say(f"{trace}\n" * unknown + own.text + f" ({at})" * bool(at))
                raise Told(own.code) from error
        self._save("".join(traceback.format_exception(error)))
        raise Told(self._failure.code) from error

    def _acts(self) -> bool:
        """Whether an action of a schedule is under way."""
        entry = self.record.now()
        return entry is not None and not isinstance(entry.what, str)

    def _announce(self, own: Failure) -> Failure:
        """Make a failure the job's unless it has one; where the store is gone, it is this rank's alone."""
        try:
            return failure.tell(self._connect(), own)
        except Exception:  # of the store, whatever it is
            return own

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _save(self, text: str) -> str:
        """Write this rank's record and a text to the run's folder; returns the folder's name, "" without."""
        return folder.save(self.run_dir, self.place.rank, text, self.record.to_json())

    # the thread that looks

    def _guard(self) -> None:
        try:
            self._go_on()
        except Exception:  # a fault of ours must not end a run that is well
            self._stacks.stop_timer()
            self._say(f"warning: rank {self.place.rank} has lost its heartbeat\n{traceback.format_exc()}")

    def _go_on(self) -> None:
        number, last = 0, time.monotonic()
        while not self._over.wait(BEAT_S if number else 0.0) or self._failure is not None:
            now = time.monotonic()
            if now - last > SLEPT_S:
                self._slept += now - last
                self._answered, self._still = now, (None, now)
            last, number = now, number + 1
            self._stacks.set_timer()
            self._look(number, now)
            self._look_for_agent()
            if self._failure is not None:
                self._end(self._failure)
                return
            silent = now - self._answered
            if silent > self.place.timeout_s or (self._lost and silent > LOST_S):
                self._end_alone()
                return
        self._post = replace(self._post, number=number + 1, at="the end", done=True)
        self._wake.set()

    def _look(self, number: int, now: float) -> None:
        """See what the main thread does, and call for a verdict where that has lasted too long."""
        site, entry = site_of(self._thread), self.record.now()
        waits, name = (site.waits, site.name) if site is not None else (False, "")
        doing = self.record.count, None if entry is None else entry.began, waits
        same = (*doing, site.stack) if waits and site is not None else doing
        if self._still[0] != same:
            self._still = (same, now)
        still = now - self._still[1]
        if entry is not None and not waits and entry.extra_s is not None:
            limit: float | None = self.place.timeout_s + entry.extra_s
        else:
            # The messages' own limit comes first where they have one.
            limit = self.place.timeout_s + BEAT_S if waits else None
        if limit is not None and still > limit and not self._calls:
            self._calls = "the time is over"
        self._post = Post(number, str(self.record), waits, name, round(still, 3), self._calls)
        self._wake.set()

    def _look_for_agent(self) -> None:
        """A rank whose agent is gone would go on where nobody sees it, and write into the run's folder while
        the others are started again."""
        rank, agent = self.place.rank, self.place.agent
        if agent and self._parting is None and os.getppid() != agent:
            text = f"rank {rank} has lost torchrun's agent (process {agent}), which started it; {self.record}"
            self._parting = Failure(text, rank, 1, rank, hangs=True)

    def _end(self, failed: Failure) -> None:
        """The job has failed: keep what this rank was at, and see that it ends."""
        own = failed.teller == self.place.rank
        # An error of this rank is told by the main thread, with its traceback.
        at = self._save(self._stacks.text()) if failed.hangs or not own else ""
        if own and failed.hangs:
            self._say(failed.text + f" (stacks and last actions of all ranks: {at})" * bool(at))
        if failed.hangs and failed.rank is not None and failed.rank != self.place.rank:
            self._end_culprit(failed.rank)
        if not self._over.wait(GRACE_S):
            self._exit(failed.code)

    def _end_culprit(self, rank: int) -> None:
        """End the rank that hangs, with its stacks; the first other rank on its machine does."""
        if self._watch is None:
            return
        try:
            folder.end_rank(self._watch, rank, self.run_dir)
        except Exception as error:  # of the store or the system: this rank must end all the same
            self._say(f"rank {rank} could not be ended: {error}")

    def _end_alone(self) -> None:
        """The store no longer answers, so nobody can be told, and nobody speaks for all."""
        why = self._lost or f"does not answer for {time.monotonic() - self._answered:.0f} s"
        at = self._save(self._stacks.text())
        if self.place.lead_here:
            of = f" at {self.place.store}" * bool(self.place.store)
            self._say(
                f"rank {self.place.rank}: the job's store{of} {why}; the launcher that serves it has ended, "
                f"hangs or cannot be reached, so the ranks end ({self.record})" + f" ({at})" * bool(at)
            )
        self._exit(1)

    def _exit(self, code: int) -> None:
        """End this process although its main thread hangs."""
        done = threading.Thread(target=self._last, daemon=True)
        done.start()
        done.join(2 * GRACE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # the thread that talks

    def _talk(self) -> None:
        try:
            self._converse()
        except Exception as error:  # the store is gone, for whatever reason
            if not self._over.is_set():
                self._lost = f"is lost ({str(error).splitlines()[0] if str(error) else type(error).__name__})"

    def _converse(self) -> None:
        place, store = self.place, self._connect()
        files = self._stacks.number, self._window.number
        about = About(this_machine(), os.getpid(), *files, name=socket.gethostname())
        failure.prepare(store)
        watch = self._watch = Watch(store, place.rank, place.world, about)
        slept = 0.0
        while True:
            self._wake.wait()
            self._wake.clear()
            post = self._say_post(store)
            if slept != self._slept:
                slept, away = self._slept, self._slept - slept
                watch.shift(away)
            failed = failure.read(watch.read(watch.mine, failure.KEY))
            self._answered = time.monotonic()
            if self._parting is not None:
                failed = failure.tell(store, self._parting)
            if self._take(failed) or post.done:
                return
            if watch.rank == LEAD or watch.lead_is_lost():
                self._judge(store, watch)

    def _say_post(self, store: Store) -> Post:
        post = replace(self._post, calls=self._calls)
        store.set(post_key(self.place.rank), post.dump())
        return post

    def _take(self, failed: Failure | None) -> bool:
        if failed is None:
            return False
        if self._failure is None:
            self._failure = failed
        self._heard.set()
        return True

    def _judge(self, store: Store, watch: Watch) -> None:
        """Find out who is to blame, where some rank asks and this one is to judge."""
        if watch.rank == LEAD:
            asked = watch.calls()
        else:
            mine = str(watch.rank)
            asked = bool(self._calls) and store.compare_set("judge", "", mine).decode() == mine
        if not asked:
            return

        def failed() -> bool:
            self._say_post(store)  # who judges must not fall silent
            value, self._answered = store.get(failure.KEY), time.monotonic()
            return self._take(failure.read(value))

        verdict = watch.judge(failed)
        if verdict is None:
            return
        rank, text = verdict.rank, verdict.why
        if rank is not None:
            text = f"rank {rank} {text}"
        if not verdict.sure:
            callers = watch.callers()
            rank, text = None, f"ranks lost touch, and none of them is seen to be the reason: {callers}"
        self._take(failure.tell(store, Failure(text, rank, 1, watch.rank, hangs=True)))
