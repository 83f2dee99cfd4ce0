"""Steps are planned in a process of their own, so that planning takes no time from the launching of kernels.

A thread would: what it computes in Python, and each hand-over of the interpreter's lock, holds up the thread
that launches. The process is forked from its rank, as the workers of torch's DataLoader are, and shares the
columns of the data set with it. It computes with Python and numpy, and uses no device, group or thread.
Schedules that the rank lacks come with the plans.

Plans come back through a pipe that only the rank and its process have; nothing else is ever unpickled.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from mm.errors import DataError, PolyrankError
from mm.forks import fork
from mm.plan.inputs import PlanInputs
from mm.plan.step_plan import StepPlan
from mm.plan.table import DataTable, SampleTable
from mm.ranks.batch import RankBoundary
from mm.ranks.stop import REQUESTS
from parallel.schedule import SchedulePlan

POLL_S = 1.0  # how often a process without work looks whether its rank is still there
GRACE_S = 2.0  # that a process has to end after its pipe has


class Planned(NamedTuple):
    """A step's plan, and this rank's part of its edges by micro-batch.

    schedule: the step's, where the rank does not have it yet.
    """

    plan: StepPlan
    boundary: list[RankBoundary]
    schedule: SchedulePlan | None = None


class _Failed(NamedTuple):
    """Why a step could not be planned. of_data: whether its data are at fault."""

    why: str
    of_data: bool


PlanStep = Callable[[int, frozenset[int]], Planned]  # of a step and the samples that are known to be bad


class Planner:
    """A process that plans one step after the other for its rank.

    plan: pure, and made of what is there when the planner is made. table, inputs: of all its plans. rank: for
    errors.
    """

    def __init__(self, plan: PlanStep, table: SampleTable | DataTable, inputs: PlanInputs, rank: int) -> None:
        self._table, self._inputs, self._rank = table, inputs, rank
        self._pipe, theirs = Pipe()
        self._known_bad: frozenset[int] | None = None  # the bad samples that the process knows
        self.asked: tuple[int, frozenset[int]] | None = None  # what it is to answer
        parent = os.getpid()
        self.pid = fork()
        if self.pid == 0:
            try:
                self._pipe.close()
                _serve(theirs, plan, parent)
            finally:
                os._exit(0)  # nothing of the rank's is run or flushed twice
        theirs.close()

    def plan(self, step: int, known_bad: frozenset[int]) -> Planned:
        """The plan of a step, as ask() and answer() give it."""
        self.ask(step, known_bad)
        return self.answer()

    def ask(self, step: int, known_bad: frozenset[int]) -> None:
        """Have a step planned, while the rank does something else. There is one question at a time. Raises
        PolyrankError as answer() does."""
        assert self.asked is None, "the answer before has not been taken"
        try:
            # They may be many and seldom change, so they are sent once.
            self._pipe.send((step, None if known_bad is self._known_bad else known_bad))
        except OSError as error:
            raise PolyrankError(f"step {step + 1}: {self._ended()}") from error
        self._known_bad = known_bad
        self.asked = step, known_bad

    def answer(self) -> Planned:
        """The plan of the step that was asked for. Raises DataError as planning does, and PolyrankError
        naming the process where it has failed or ended."""
        assert self.asked is not None
        (step, _), self.asked = self.asked, None
        try:
            found = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise PolyrankError(f"step {step + 1}: {self._ended()}") from error
        if isinstance(found, _Failed):
            if found.of_data:
                raise DataError(found.why)
            raise PolyrankError(f"step {step + 1}: the planner of rank {self._rank} failed:\n{found.why}")
        assert isinstance(found, Planned)
        table = replace(found.plan.table, samples=self._table.samples)
        return found._replace(plan=replace(found.plan, table=table, inputs=self._inputs))

    def _ended(self) -> str:
        deadline, done, status = time.monotonic() + GRACE_S, 0, 0
        while self.pid and not done and time.monotonic() < deadline:
            time.sleep(0.01)
            done, status = os.waitpid(self.pid, os.WNOHANG)
        who = f"the planner process of rank {self._rank}"
        if not done:
            return f"{who} does not answer"
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"{who} ended with exit code {code}"
        memory = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return f"{who} was ended by {signal.Signals(-code).name}{memory}"

    def close(self) -> None:
        """End the process and wait for it."""
        self._pipe.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # it holds nothing that must be put away
            os.waitpid(self.pid, 0)
            self.pid = 0


def _serve(pipe: Connection, plan: PlanStep, parent: int) -> None:
    """Answer until the rank closes its end or has ended."""
    # A request to stop goes to the rank, which ends this process when it is done.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    bad = frozenset[int]()
    while os.getppid() == parent:
        try:
            if pipe.poll(POLL_S):
                step, now_bad = pipe.recv()
                bad = bad if now_bad is None else now_bad
                pipe.send(_answer(plan, step, bad))
        except (EOFError, OSError):
            return


def _answer(plan: PlanStep, step: int, bad: frozenset[int]) -> Planned | _Failed:
    """The plan as it is sent."""
    try:
        found = plan(step, bad)
    except DataError as error:
        return _Failed(str(error), of_data=True)
    except Exception:
        return _Failed(traceback.format_exc(), of_data=False)
    return bare(found)


def bare(planned: Planned) -> Planned:
    """A plan without what its rank has."""
    made = planned.plan
    inputs = replace(made.inputs, encoders={}, _rows={})
    return planned._replace(plan=replace(made, table=replace(made.table, samples=()), inputs=inputs))
