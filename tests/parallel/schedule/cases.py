"""Random schedules for the laws, and short ways to write one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from parallel.schedule import Kind, ModuleUse, ScheduleOptions, SchedulePlan, make_schedule
from parallel.schedule.action import COMPUTE, RECEIVES
from parallel.topology.data_parallel import Shards
from parallel.topology.layout import Layout, make_layout

USE = ("frozen", "params", "sums", "experts", "shards")


def use(module: str, world: int, **spec: Any) -> ModuleUse:
    """A module with layout keys and fields of ModuleUse (USE) on a job of `world` ranks."""
    fields = {key: spec.pop(key) for key in USE if key in spec}
    return ModuleUse(make_layout(module, world, spec), **fields)


def plan_of(
    kind: str, world: int, microbatches: int, specs: Mapping[str, Any], **options: Any
) -> SchedulePlan:
    """A plan of modules {name: layout keys}, "llm" the sink, in which every source is always active."""
    modules = {m: use(m, world, **spec) for m, spec in specs.items()}
    active = [set(specs) - {"llm"}] * microbatches
    return make_schedule(kind, modules, sink="llm", active=active, options=ScheduleOptions(**options))


def receives_early(plan: SchedulePlan) -> SchedulePlan:
    """The plan with every receive one computation before the one that reads it: what gloo can run, and what
    a backend without buffers and tags cannot always."""
    programs = []
    for program in plan.programs:
        out = [a for a in program if a.kind not in RECEIVES]
        for a in (a for a in program if a.kind in RECEIVES):
            reads = {Kind.FORWARD} if a.kind is Kind.RECV_FORWARD else {Kind.BACKWARD, Kind.BACKWARD_INPUT}
            same = (a.module, a.microbatch, a.stage)
            k = next(k for k, b in enumerate(out) if b.kind in reads and b[1:4] == same)
            earlier = [j for j in range(k) if out[j].kind in COMPUTE]
            out.insert(earlier[-1] if earlier else 0, a)
        programs.append(tuple(out))
    return replace(plan, programs=tuple(programs))


@dataclass(frozen=True)
class Case:
    """Arguments of make_schedule."""

    kind: str
    modules: Mapping[str, ModuleUse]
    active: tuple[frozenset[str], ...]
    ahead: int | None
    batch: Mapping[str, int]
    train: bool
    pairs: bool | None = False

    def plan(self) -> SchedulePlan:
        options = ScheduleOptions(
            self.ahead, self.batch, overlap_experts=self.pairs, train=self.train, optimizer=True
        )
        return make_schedule(self.kind, self.modules, sink="llm", active=self.active, options=options)


def layouts(module: str, world: int, *, vpp: bool = False) -> st.SearchStrategy[Layout]:
    """Any placement and degrees that make_layout accepts, ranks in any order."""

    @st.composite
    def build(draw: st.DrawFn) -> Layout:
        size = draw(st.integers(1, world))
        ranks = draw(st.permutations(range(world)))[:size]
        if draw(st.booleans()):
            ranks = sorted(ranks)
        pp = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        tp = draw(st.sampled_from([d for d in range(1, size // pp + 1) if size // pp % d == 0]))
        ep = draw(st.sampled_from([d for d in range(1, size // pp + 1) if size // pp % d == 0]))
        chunks = draw(st.integers(1, 3)) if vpp and pp > 1 else 1
        return make_layout(module, world, {"ranks": ranks, "pp": pp, "tp": tp, "ep": ep, "vpp": chunks})

    return build()


def splits(layout: Layout) -> st.SearchStrategy[Shards | None]:
    """Into how many shards the weights of a module may be split."""

    def divisors(n: int) -> st.SearchStrategy[int]:
        return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])

    return st.one_of(st.none(), st.builds(Shards, divisors(layout.dp * layout.cp), divisors(layout.edp)))


@st.composite
def paired_cases(draw: st.DrawFn, *, world: int = 8) -> Case:
    """Schedules with pairs of a forward and a backward."""
    case = draw(cases(world=world, train=True))
    llm = draw(layouts("llm", world, vpp=True).filter(lambda layout: layout.ep > 1))
    whole = draw(st.sampled_from(["step", "replicated"]))
    modules = {m: replace(u, enters=draw(entries(llm))) for m, u in case.modules.items() if m != "llm"}
    sink = replace(case.modules["llm"], layout=llm, params=whole, frozen=False, shards=draw(splits(llm)))
    return replace(case, kind="auto", modules={**modules, "llm": sink}, active=case.active * 2, pairs=True)


def any_cases(*, world: int = 8) -> st.SearchStrategy[Case]:
    """Any accepted schedule, every second one with pairs."""
    return st.one_of(cases(world=world), paired_cases(world=world))


def entries(sink: Layout) -> st.SearchStrategy[tuple[int, ...]]:
    """The stages of the sink that a source's rows enter: the first alone as a rule."""
    some = st.sets(st.integers(0, sink.pp * sink.vpp - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    return st.one_of(st.just((0,)), some)


@st.composite
def cases(draw: st.DrawFn, *, world: int = 8, train: bool | None = None) -> Case:
    """Any accepted schedule: placements, pipelines, missing modalities, frozen modules, memory bounds."""
    llm = draw(layouts("llm", world, vpp=True))
    names = draw(st.sampled_from([(), ("vision",), ("vision", "audio")]))
    found = {m: draw(layouts(m, world, vpp=True)) if m != "llm" else llm for m in (*names, "llm")}
    modules = {
        m: ModuleUse(
            layout,
            frozen=draw(st.sampled_from([False, False, True])),
            params=draw(st.sampled_from(["each", "step", "replicated"])),
            sums=draw(st.sampled_from(["step", "backward"])),
            experts=draw(st.booleans()),
            shards=draw(splits(layout)),
            enters=draw(entries(llm)) if m != "llm" else (0,),
        )
        for m, layout in found.items()
    }
    m = draw(st.integers(1, 9))
    kinds = ["auto", "gpipe", "sequential", "zero_bubble", "three_phase"]
    batch = {name: draw(st.sampled_from([1, 1, 2, 3])) for name in names}
    enough = 6  # a multiple of every batch
    return Case(
        draw(st.sampled_from(kinds)),
        modules,
        tuple(frozenset(draw(st.sets(st.sampled_from(names)))) if names else frozenset() for _ in range(m)),
        draw(st.sampled_from([None, enough, 2 * enough])),
        batch,
        draw(st.booleans()) if train is None else train,
        draw(st.sampled_from([False, None])),
    )
