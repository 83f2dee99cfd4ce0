"""One step of one rank of a job: its real code, on fake tensors and fake process groups."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from mm.config.outline import SINK
from mm.data.sample import Index
from mm.plan import batches
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.ranks.feed import Prepared, read_step
from mm.ranks.job import Job, build_job, open_data
from mm.ranks.launch import RankInfo
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
from mm.virtual.ledger import Ledger, Moment
from mm.virtual.recorder import Recorder, Stands
from mm.virtual.records import Exchanged, Trace
from mm.virtual.samples import VirtualAssembler, VirtualData
from mm.virtual.sums import sums_of
from mm.virtual.values import Values
from parallel.schedule import Action, Kind
from parallel.schedule.record import Record
from parallel.sharding.param import local
from parallel.sharding.whole import param_groups, units


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Fake tensors of a device that makes none."""

    @property
    def avoid_device_init(self) -> bool:
        """torch.tensor() then makes no tensor on the device before it is a fake one."""
        return True


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have shapes and no values; real tensors that enter become fake."""
    return _FakeMode(allow_non_fake_inputs=True)


def record_step(job: Job, recorder: Recorder, prepare_step: Callable[[], Prepared]) -> None:
    """The first step of a job as `recorder`, which is entered, sees it.

    The optimizer's state exists before, as in all later steps. prepare_step: gives the step's data.
    """
    ledger, rank = recorder.ledger, job.rank.rank
    for m, parts in job.parts.items():
        for part in parts.values():
            ledger.mark((local(p.detach()) for p in part.parameters()), "parameters", m)
            ledger.mark(part.buffers(), "other", m)
            ledger.resized(_gathered(part), m)
        ledger.mark(map(local, job.optimizers[m].state().values()), "optimizer", m)
    recorder.recording, recorder.waits.phase = True, "data"
    recorder.moment(Moment(1, "data", SINK, False))
    prepared = prepare_step()
    _mark_inputs(prepared, ledger)
    schedule = job.blueprint.schedule(prepared.plan.active)
    actions = schedule.actions(rank)
    upcoming = iter([*map(_moment, count(2), actions), Moment(len(actions) + 2, "update", SINK, False)])
    recorder.waits.phase = "step"
    recorder.moment(next(upcoming))

    def observe(record: Record) -> None:
        if record.action.kind in _BACKWARDS:
            _mark_gradients(job, ledger, [record.action.module])
        recorder.moment(next(upcoming))

    result = run_step(job, prepared, train=True, observe=observe)
    recorder.waits.phase = "update"
    _mark_gradients(job, ledger, job.parts)
    finish_step(job, result, 0, learning_rate(job.blueprint.cfg.train, 0))
    recorder.recording = False


def _moment(number: int, action: Action) -> Moment:
    return Moment(number, str(action), action.module, action.kind is Kind.FORWARD)


def _mark_inputs(prepared: Prepared, ledger: Ledger) -> None:
    """Follow what a step is given. What reading and decoding use is not the step's."""
    for mb in prepared.micro:
        for m, items in mb.items.items():
            ledger.mark([items.values], "other", m)
        if mb.llm is not None:
            given = [mb.llm.ids, mb.llm.labels, *mb.llm.row_positions.values(), *(mb.llm.ahead or ())]
            given += [] if mb.llm.packing.places is None else [mb.llm.packing.places]
            ledger.mark([*given, *(mb.llm.loss_rows or ()), *mb.depends.values()], "other", SINK)


def _gathered(part: nn.Module) -> Iterator[Tensor]:
    """Tensors in which FSDP gathers weights, if it has done so before."""
    for group in (group for unit in units(part) for group in param_groups(unit)):
        for held in group.fsdp_params:
            yield from held.all_gather_outputs


_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.GRAD_SYNC)


def _mark_gradients(job: Job, ledger: Ledger, modules: Iterable[str]) -> None:
    """Name the gradients of weights, sharded or whole, that are there now."""
    for m in modules:
        for part in job.parts[m].values():
            sharded = [_held(p.grad) for p in part.parameters() if p.grad is not None]
            ledger.mark(sharded, "gradients", m)
            ledger.mark(_whole_gradients(part), "gradients", m)


def _whole_gradients(part: nn.Module) -> Iterator[Tensor]:
    """Gradients of gathered weights, which FSDP keeps until it reduces them."""
    groups = (group for unit in units(part) for group in param_groups(unit))
    for held in (p for group in groups for p in group.fsdp_params):
        whole = getattr(held, "_unsharded_param", None)
        grads = [held.unsharded_accumulated_grad, None if whole is None else whole.grad]
        yield from (_held(g) for g in grads if g is not None)


def _held(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, as it is: to_local() would be an operation of its own."""
    return x._local_tensor if isinstance(x, DTensor) else x


def group_names(job: Job) -> dict[str, str]:
    """What plans call the process groups of a job on this rank, by the groups' own names."""
    names: dict[str, list[str]] = {}
    for name in job.blueprint.groups.of_rank(job.rank.rank):
        names.setdefault(job.groups[name].group_name, []).append(str(name))
    return {own: "=".join(dict.fromkeys(found)) for own, found in names.items()}


def first_plan(blueprint: Blueprint, index: Index) -> StepPlan:
    """The plan of step 0."""
    return batches.first_plan(blueprint.cfg, blueprint.inputs, index)


def virtual_step(job: Job, data: VirtualData) -> Prepared:
    """The first step's data on this rank, without payloads."""
    assembler = VirtualAssembler.of(open_data(job, data.index).assembler)
    plan = first_plan(job.blueprint, data.index)
    return read_step(plan, assembler)


def _note(skew: float) -> str:
    return "tokens choose experts evenly" if skew <= 1 else f"the fullest expert has {skew:g} times the mean"


@contextmanager
def fake_groups(rank: int, world: int, device: torch.device) -> Iterator[None]:
    """A default process group of `world` ranks that moves nothing. Refused where there is one already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a virtual rank needs a process without a default process group; this one has one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = ",".join(f"{on}:fake" for on in dict.fromkeys(("cpu", device.type)))
        dist.init_process_group(backend, rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def virtual_rank(
    blueprint: Blueprint,
    rank: int,
    device: torch.device,
    *,
    data: VirtualData,
    skew: float = 1.0,
    gave: Mapping[int, Exchanged] | None = None,
) -> Trace:
    """One step of a rank of the job, by its real code: data, forward and backward, update.

    device: accelerator(), or the CPU, where host waits for copies cannot be seen. skew: of drawn_choices().
    gave: by rank, Trace.exchanged of an earlier trace; where it is not given, others are taken to hold the
    same integers as this rank. Machines have blueprint.node_size ranks.
    """
    world, cfg, node_size = blueprint.world, blueprint.cfg, blueprint.node_size
    info = RankInfo(rank, world, device, node_size=node_size, timeout_s=cfg.run.timeout_s)
    names: dict[str, str] = {}
    fake = fake_mode()
    recorder = Recorder(
        device,
        rank,
        values=Values(fake, skew),
        names=lambda group: names.get(group.group_name, group.group_name),
        node_size=node_size,
        gave=gave or {},
    )
    with fake_groups(rank, world, device), fake, recorder, Stands(device):
        job = build_job(blueprint, info, draw=False)
        names.update(group_names(job))
        recorder.forget()
        recorder.sums = sums_of(job, names)
        record_step(job, recorder, lambda: virtual_step(job, data))
        job.close()
        gc.collect()
    return recorder.trace(world, (data.note, _note(skew)))
