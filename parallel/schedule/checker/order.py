"""An order in which all computations of a plan can be done, or why there is none. Pure.

What a plan computes does not depend on how long things take, so one such order proves that nothing deadlocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from parallel.schedule.action import OVER_DATA, SEND_FORWARD, Action
from parallel.schedule.checker.reader import START, Collective, Flow, Reading, TransferKey
from parallel.schedule.plan import SchedulePlan


class Stuck(ValueError):
    """A plan that cannot run to its end. waiting: by program that stops, what it waits for, as text."""

    def __init__(self, waiting: Sequence[str]) -> None:
        self.waiting = waiting
        super().__init__("the schedule cannot finish: " + "; ".join(waiting[:4]))


def find_order(
    plan: SchedulePlan, reading: Reading, waits: Mapping[int, Sequence[TransferKey]]
) -> list[tuple[int, ...]]:
    """The computations in an order in which they can be done; those that begin together are one entry.

    waits: by computation, the transfers that it waits for. Raises Stuck where there is no such order.
    """
    return _Order(plan, reading, waits).run()


class _Order:
    """Takes every program as far as it gets, again and again, until all are at their ends."""

    def __init__(
        self, plan: SchedulePlan, reading: Reading, waits: Mapping[int, Sequence[TransferKey]]
    ) -> None:
        self.plan, self.reading, self.waits = plan, reading, waits
        self.computations = reading.computations
        self.order: list[tuple[int, ...]] = []
        self.at = [0] * len(plan.programs)  # by program, how many computations are done
        self.done = [False] * reading.first[-1] + [True]  # by number; the last is START
        self.arrived: dict[Collective, list[int]] = defaultdict(list)  # the programs that wait in it
        self.waiters: dict[int, list[int]] = defaultdict(list)  # programs that wait for a computation
        ends = [self._ends(flow) for flow in reading.flows]
        # The transfers that all their ends start.
        self.started = {key: after for key, after in reading.transfers.items() if len(after) == ends[key[0]]}

    def run(self) -> list[tuple[int, ...]]:
        """The order. Raises Stuck where a program cannot reach its end."""
        free = list(range(len(self.plan.programs)))
        while free:
            free += self._advance(free.pop())
        unfinished = [p for p, mine in enumerate(self.computations) if self.at[p] < len(mine)]
        waiting = [self._reason(p) for p in sorted({*unfinished, *self.reading.stopped})]
        transfers = self.reading.transfers
        if waiting or len(self.started) < len(transfers):
            raise Stuck(waiting or [self._describe(key) for key in transfers if key not in self.started])
        return self.order

    def _advance(self, p: int) -> list[int]:
        """Take program p as far as it gets; returns the programs that may now get further."""
        mine, free, second = self.computations[p], list[int](), self.reading.second
        while self.at[p] < len(mine):
            number = mine[self.at[p]]
            missing = self._missing(number)
            if missing is not None:
                if missing != START:  # else it waits for good
                    self.waiters[missing].append(p)
                break
            together = [p]
            if number in self.reading.collectives:
                collective = self.reading.collectives[number]
                together = self.arrived[collective]
                together.append(p)
                if len(together) < len(collective.programs):
                    break
                free += together[:-1]
            begun = [self.computations[q][self.at[q]] for q in together]
            if begun[0] in second:
                begun += [second[n] for n in begun]
            self.order.append(tuple(begun))
            for q in together:
                self.at[q] += 1
            for n in begun:
                self.done[n] = True
                if n in self.waiters:
                    free += self.waiters.pop(n)
        return free

    def _missing(self, number: int) -> int | None:
        """A computation that another one still waits for; START where a transfer is never under way."""
        for key in self.waits.get(number, ()):
            if key not in self.started:
                return START
            for n in self.started[key]:
                if not self.done[n]:
                    return n
        return None

    def _ends(self, flow: Flow) -> int:
        """How many programs must start a transfer of a flow."""
        if flow.ends is not None:
            return len(flow.ends)
        return len(frozenset().union(*self.plan.ends(flow.module, flow.stage)))

    def _reason(self, p: int) -> str:
        """Where program p has stopped and for what, as text."""
        mine = self.computations[p]
        if self.at[p] == len(mine):
            a, kind, (module, i, stage) = self.reading.stopped[p]
            why = f"{kind.value}({module}.{stage}, {i}) on the rank itself"
        else:
            number = mine[self.at[p]]
            a = self.plan.programs[p][number - self.reading.first[p]]
            missing = [
                key
                for key in self.waits.get(number, ())
                if key not in self.started or not all(self.done[n] for n in self.started[key])
            ]
            if missing:
                why = self._describe(missing[0])
            else:
                came = self._ranks(self.arrived[self.reading.collectives[number]])
                why = f"the other members of its groups (only {came} came)"
        return f"{self._ranks([p])}: {a} waits for {why}"

    def _describe(self, key: TransferKey) -> str:
        """A transfer as text."""
        number, i = key
        flow = self.reading.flows[number]
        module, stage = flow.module, flow.stage
        if flow.ends is None:
            return f"{Action(flow.kind, module, i, stage)} to be started by every rank of the edge"
        if flow.kind in OVER_DATA:
            return f"{Action(flow.kind, module, i, stage)} to be started by all of its data ranks"
        carries = "activations" if flow.kind is SEND_FORWARD else "gradients"
        where = f"between {module}.{stage - 1} and {module}.{stage} from {self._ranks(flow.ends[:1])}"
        return f"{carries} of micro-batch {i} {where}"

    def _ranks(self, programs: Iterable[int]) -> str:
        return ", ".join(f"rank {self.plan.ranks_of[q][0]}" for q in programs)
