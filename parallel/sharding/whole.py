"""Whole weights of a sharded module between FSDP's own moments: gathered, freed, gradients summed.

FSDP gathers before a forward or a backward, frees after a backward and sums gradients in one. A module of
which weights stay whole for longer, or whose gradients are computed apart from FSDP's backward, needs the
same steps at times of its own. Gathers and sums are only started here; what needs them waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


def gather(module: nn.Module) -> None:
    """Start to make the weights whole; nothing where they are. Collective over the module's data ranks.

    The forward of each unit waits for its weights. Anything else that reads them calls wait() first.
    """
    for unit in units(module):
        unit.unshard(async_op=True)


def wait(module: nn.Module) -> None:
    """Wait for a gather under way, on the current stream; nothing where there is none."""
    for unit in units(module):
        # What the handle that unshard() returns does. This needs none, so that a gather may outlive a step.
        for group in param_groups(unit):
            group.wait_for_unshard()


def free(module: nn.Module) -> None:
    """Give the memory of whole weights back; the shards are the module's parameters again."""
    wait(module)  # else a gather under way would bring these weights back after an update
    for unit in units(module):
        unit.reshard()


def keep(module: nn.Module, kept: bool) -> None:
    """Whether whole weights stay after the next backward."""
    for unit in units(module):
        unit.set_reshard_after_backward(not kept, recurse=False)


class PostedSums:
    """Sums of a module's gradients over its data ranks that run beside what the host does next.

    For backends whose waits block the host; on others FSDP's streams do the same. A gradient may not be read
    before wait().
    """

    def __init__(self, most: int) -> None:
        """most: how many sums may be under way, each with the gradients that it reads."""
        self.most = most
        self._under_way: deque[tuple[dist.Work, Tensor, Tensor]] = deque()

    def begun(self, work: dist.Work, into: Tensor, of: Tensor) -> None:
        """Take note of a sum that has begun, and keep its tensors until it is there."""
        self._under_way.append((work, into, of))

    def wait(self, left: int = 0) -> None:
        """Wait, in the order in which they began, until at most `left` sums are under way."""
        while len(self._under_way) > left:
            self._under_way.popleft()[0].wait()


class _UnitSums(DefaultReduceScatter):
    """The sums of one unit, started by FSDP. FSDP adds a second one of a step to the first at once, so that
    one has to be there: a unit has several where a backward comes to it several times."""

    def __init__(self, posted: PostedSums) -> None:
        super().__init__()
        self._posted, self._again = posted, False

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work:
        """Start the sum of `input_tensor` [n * ranks] into `output_tensor` [n]."""
        self._posted.wait(self._posted.most - 1)
        work = super().__call__(output_tensor, input_tensor, group, op, True)
        self._posted.begun(work, output_tensor, input_tensor)
        if self._again:
            self._posted.wait()
        self._again = True
        return work


def post_sums(module: nn.Module, most: int = 1) -> PostedSums:
    """Have the coming sums of a module only started; they are there after wait() of what is returned."""
    posted = PostedSums(most)
    for unit in units(module):
        unit.set_custom_reduce_scatter(_UnitSums(posted))
    return posted


def sum_in_backward(module: nn.Module, summed: bool, *, final: bool) -> None:
    """Whether the next backward sums gradients over the data ranks, else adds them up on this rank.

    final: it is the step's last, in which shards that have replicas are summed over these too. Nothing waits
    for the sums before finish_sums().
    """
    # In the last backward FSDP waits for its streams. A host has none, and only frees buffers in it.
    waits = final and on_host(module)
    for unit in units(module):
        unit.set_requires_gradient_sync(summed, recurse=False)
        unit.set_requires_all_reduce(summed and final, recurse=False)
        unit.set_is_last_backward(waits)


def sum_now(module: nn.Module, summed: bool, *, final: bool) -> None:
    """What the end of a backward does (sum_in_backward), for gradients that are there already."""
    # First without a sum: gradients of this and of an earlier moment may have two dtypes, which are added up
    # in that of the sum.
    sum_in_backward(module, False, final=False)
    _end_of_backward(module)
    if summed:
        sum_in_backward(module, True, final=final)
        _end_of_backward(module)


def finish_sums(module: nn.Module) -> None:
    """Wait for all sums of the step, on the current stream, and drop what FSDP keeps between backwards."""
    for unit in units(module):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_is_last_backward(True)
    _end_of_backward(module)


def on_host(module: nn.Module) -> bool:
    """Whether a module is on the CPU. FSDP has no streams there, and its sums block."""
    return next(module.parameters()).device.type == "cpu"


def _end_of_backward(module: nn.Module) -> None:
    """FSDP's callback at the end of a backward, for which it has no public call.

    It ends the backward of units that none has gone through, which is all of them here.
    """
    assert isinstance(module, FSDPModule)
    module._get_fsdp_state()._root_post_backward_final_callback()


class Phases:
    """Where FSDP takes modules to be: in a forward, in a backward, or in neither.

    It has one such state for all of a module's computations. Two that take turns each need their own, or a
    forward would leave out its hooks where the backward of another micro-batch is. Weights must stay whole.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._at: list[tuple[Any, str]] = []
        for unit in (unit for module in modules for unit in units(module)):
            state: Any = unit._get_fsdp_state()
            self._at += [(x, "_training_state") for x in (state, *param_groups(unit))]
            if (state._state_ctx, "iter_forward_root") not in self._at:
                self._at.append((state._state_ctx, "iter_forward_root"))

    def save(self) -> list[Any]:
        """The phase of every part."""
        return [getattr(x, name) for x, name in self._at]

    def load(self, saved: list[Any]) -> None:
        """Make these the phases."""
        for (x, name), value in zip(self._at, saved, strict=True):
            setattr(x, name, value)


def units(module: nn.Module) -> Iterator[FSDPModule]:
    """The module and the parts of it that FSDP gathers on their own."""
    return (sub for sub in module.modules() if isinstance(sub, FSDPModule))


def param_groups(unit: FSDPModule) -> Iterator[Any]:
    """The parameters of a unit, as FSDP groups them: versions of torch differ in how many there may be."""
    state: Any = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return (group for group in groups if group is not None)
