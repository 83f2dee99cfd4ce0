"""No bound is above what the simulated schedule takes, or what its ranks hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mm.search.bound import (
    Demand,
    Open,
    Others,
    Placed,
    bytes_bound,
    floor_bound,
    floor_of,
    seconds_bound,
)
from mm.search.candidate import Block
from parallel.schedule import ModuleUse, ScheduleOptions, SchedulePlan, make_schedule
from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Kind
from parallel.schedule.checker.memory import Memory, peaks
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import simulate
from parallel.topology.layout import make_layout

WORLD = 8
BLOCKS = {"own": Block(0, 4), "shared": Block(4, 8), "all": Block(0, 8), "first": Block(4, 6)}
SECONDS = st.integers(0, 8).map(float)


@dataclass(frozen=True)
class Case:
    kind: str
    microbatches: int
    demands: dict[str, Demand]
    blocks: dict[str, Block]
    loads: dict[tuple[str, int], float]
    transfer: dict[tuple[str, Kind], float]
    batch: dict[str, int]

    def placed(self, module: str) -> Placed:
        return Placed(self.demands[module], self.blocks[module])

    @property
    def encoders(self) -> list[Placed]:
        return [self.placed(m) for m in self.demands if m != "llm"]

    def plan(self) -> SchedulePlan:
        uses = {}
        for m, demand in self.demands.items():
            start, stop = self.blocks[m]
            spec = {"ranks": f"{start}-{stop - 1}", "pp": demand.pp, "vpp": len(demand.forward) // demand.pp}
            uses[m] = ModuleUse(make_layout(m, WORLD, spec), params="step")
        active = [set(uses) - {"llm"}] * self.microbatches
        options = ScheduleOptions(batch=self.batch, costs=self.costs(), optimizer=True)
        return make_schedule(self.kind, uses, sink="llm", active=active, options=options)

    def costs(self) -> Costs:
        compute: dict[tuple[str, Kind] | tuple[str, int, Kind], float] = {}
        for m, d in self.demands.items():
            for s in range(len(d.forward)):
                compute[m, s, FORWARD], compute[m, s, BACKWARD] = d.forward[s], d.backward[s]
                compute[m, s, BACKWARD_INPUT] = d.early[s]
                compute[m, s, BACKWARD_WEIGHT] = d.backward[s] - d.early[s]
        return Costs(compute, self.transfer, load=self.loads)


@st.composite
def demands(draw: st.DrawFn, pp: int, vpp: int, loads: list[float], split: bool) -> Demand:
    def each(n: int) -> tuple[float, ...]:
        return tuple(draw(SECONDS) for _ in range(n))

    stages, share = pp * vpp, 0.5 if split else 1.0
    backward = each(stages)
    return Demand(
        pp=pp,
        forward=each(stages),
        backward=backward,
        early=tuple(share * b for b in backward),
        held=each(pp),
        kept=each(stages),
        mean=sum(loads) / len(loads),
        least=min(loads),
        ends=(loads[0], loads[-1]),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pp, m = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    known = ["interleaved", "zero_bubble"] if vpp > 1 else ["1f1b", "zero_bubble", "gpipe", "sequential"]
    kind = draw(st.sampled_from([*known, "three_phase", "fill"] if pp > 1 and vpp == 1 else known))
    loads = {name: [draw(st.sampled_from([0.5, 1.0, 1.5])) for _ in range(m)] for name in ("llm", "a", "b")}
    split = kind == "zero_bubble"
    found = {}
    blocks = {"llm": draw(st.sampled_from([BLOCKS["shared"], BLOCKS["all"]]))}
    batch = {}
    for name in ("a", "b")[: draw(st.integers(0, 2))]:
        where = ["all"] if blocks["llm"].size == WORLD else ["own", "shared", "first"]
        block = BLOCKS[draw(st.sampled_from(where))]
        deep = draw(st.sampled_from([1, 2])) if block.size > 2 and kind != "fill" else 1
        found[name] = draw(demands(deep, 1, loads[name], False))
        blocks[name], batch[name] = block, draw(st.integers(1, min(2, m)))
    found["llm"] = draw(demands(pp, vpp, loads["llm"], split))
    flat = {(name, i): x for name, row in loads.items() for i, x in enumerate(row)}
    kinds = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.BOUNDARY_FORWARD, Kind.BOUNDARY_BACKWARD)
    transfer = {(name, k): draw(SECONDS) / 8 for name in found for k in kinds}
    return Case(kind, m, found, blocks, flat, transfer, batch)


def made(case: Case) -> SchedulePlan:
    try:
        return case.plan()
    except ValueError:
        assume(False)
        raise


FEW = settings(max_examples=8, deadline=None)
MANY = settings(max_examples=300, deadline=None)


@FEW
@given(cases())
def test_a_step_takes_no_less(case: Case) -> None:
    check_seconds(case)


@pytest.mark.slow
@MANY
@given(cases())
def test_many_steps_take_no_less(case: Case) -> None:
    check_seconds(case)


def check_seconds(case: Case) -> None:
    took = simulate(made(case), case.costs()).seconds
    assert seconds_bound(case.placed("llm"), case.encoders, (), case.microbatches) <= took


@FEW
@given(cases())
def test_a_rank_holds_no_less(case: Case) -> None:
    check_bytes(case)


@pytest.mark.slow
@MANY
@given(cases())
def test_many_ranks_hold_no_less(case: Case) -> None:
    check_bytes(case)


def check_bytes(case: Case) -> None:
    plan = made(case)
    kept = {(m, s): x for m, d in case.demands.items() for s, x in enumerate(d.kept)}
    held = []
    for peak in peaks(plan, Memory(kept, load=case.loads)):
        place = dict(zip(plan.modules, plan.places[plan.program_of[peak.ranks[0]]], strict=True))
        own = sum(case.demands[m].held[pp] for m, pp in place.items() if pp is not None)
        held.append(own + peak.bytes)
    bound = bytes_bound(case.placed("llm"), case.encoders, (), case.kind, case.microbatches)
    assert bound <= max(held)


@FEW
@given(cases(), st.data())
def test_what_is_not_decided_bounds_all_its_options(case: Case, data: st.DataObject) -> None:
    assume(len(case.demands) > 1)
    name = next(iter(case.demands))
    m, mine = case.microbatches, case.demands[name]
    loads = [case.loads[name, i] for i in range(m)]
    options = [mine, data.draw(demands(1, 1, loads, False)), data.draw(demands(2, 1, loads, False))]
    rest = [e for e in case.encoders if e.demand is not mine]
    held = min(min(d.held) for d in options)
    seconds = min(min(d.work(pp, m) for pp in range(d.pp)) for d in options)
    through = min(d.heaviest for d in options)
    undecided = Open(case.blocks[name], seconds, held, through=through)
    seconds = seconds_bound(case.placed("llm"), rest, [undecided], m)
    byte = bytes_bound(case.placed("llm"), rest, [undecided], case.kind, m)
    for option in options:
        encoders = [*rest, replace(case.placed(name), demand=option)]
        assert seconds <= seconds_bound(case.placed("llm"), encoders, (), m)
        assert byte <= bytes_bound(case.placed("llm"), encoders, (), case.kind, m)


def test_the_bound_of_an_even_pipeline_is_its_step() -> None:
    """m micro-batches, and one more for each further pipeline rank."""
    each = (1.0, 1.0)
    demand = Demand(2, each, (2.0, 2.0), (2.0, 2.0), held=(0.0, 0.0), kept=each, least=1.0, ends=each)
    case = Case("1f1b", 3, {"llm": demand}, {"llm": BLOCKS["all"]}, {}, {}, {})
    found = seconds_bound(case.placed("llm"), (), (), 3)
    assert found == pytest.approx(12.0) == simulate(case.plan(), case.costs()).seconds


def test_a_micro_batch_of_an_encoder_goes_through_all_its_stages_and_back() -> None:
    """Of uneven ones too: the one with most has the mean load at least."""
    deep = Demand(4, (1.0,) * 4, (2.0,) * 4, (2.0,) * 4, (0.0,) * 4, (0.0,) * 4)
    sink = Placed(Demand(1, (1.0,), (1.0,), (1.0,), (0.0,), (0.0,), least=0.5), Block(0, 4))
    found = seconds_bound(sink, [Placed(deep, Block(4, 8))], [], 2)
    assert found == pytest.approx(4 * 1.0 + 4 * 2.0 + 0.5 * 2.0)


def test_a_micro_batch_goes_through_an_encoder_of_which_nothing_is_decided_too() -> None:
    sink = Placed(Demand(1, (1.0,), (2.0,), (2.0,), (0.0,), (0.0,), least=0.5), Block(0, 4))
    undecided = [Open(Block(4, 8), 3.0, 0.0, through=9.0), Open(Block(4, 8), 3.0, 0.0, through=7.0)]
    assert seconds_bound(sink, [], undecided, 1) == pytest.approx(9.0 + 0.5 * 3.0)
    others = Others.of(sink.block, sink.block, undecided)
    assert floor_bound(floor_of(sink.demand, 1), others)[0] == pytest.approx(9.0 + 0.5 * 3.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_floors_are_the_bounds_of_a_sink_of_whose_encoders_nothing_is_decided(data: st.DataObject) -> None:
    pp, m = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 4))
    loads = [data.draw(st.sampled_from([0.5, 1.0, 1.5])) for _ in range(m)]
    demand = data.draw(demands(pp, 1, loads, split=False))
    demand = demand._replace(
        gradients=demand.held, kept=(0.0,) * pp, before=data.draw(SECONDS), after=data.draw(SECONDS)
    )
    sink = Placed(demand._replace(update=data.draw(SECONDS)), BLOCKS["shared"])
    first = Block(4, 4 + 4 // pp)
    blocks = [data.draw(st.sampled_from([BLOCKS["own"], BLOCKS["shared"], first])) for _ in range(2)]
    undecided = [Open(b, data.draw(SECONDS), data.draw(SECONDS), 1.0, data.draw(SECONDS)) for b in blocks]
    cores = data.draw(st.sampled_from([1.0, float("inf")]))
    others = Others.of(sink.block, first, undecided)
    sink = replace(sink, demand=sink.demand._replace(share=0.0))
    seconds, held = floor_bound(floor_of(sink.demand, m), others, cores)
    assert seconds == pytest.approx(seconds_bound(sink, [], undecided, m, cores))
    assert held == pytest.approx(bytes_bound(sink, [], undecided, "1f1b", m))
