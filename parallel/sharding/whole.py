"""Whole weights of a sharded module between FSDP's own moments: gathered, freed, gradients summed.

FSDP gathers before a forward or a backward, frees after a backward and sums gradients in one. A module of
which weights stay whole for longer, or whose gradients are computed apart from FSDP's backward, needs the
same steps at times of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def gather(module: nn.Module) -> None:
    """Make the weights whole now; nothing where they are. Collective over the module's data ranks."""
    for unit in _units(module):
        unit.unshard()


def free(module: nn.Module) -> None:
    """Give the memory of whole weights back; the shards are the module's parameters again."""
    for unit in _units(module):
        unit.reshard()


def keep(module: nn.Module, kept: bool) -> None:
    """Whether whole weights stay after the next backward."""
    for unit in _units(module):
        unit.set_reshard_after_backward(not kept, recurse=False)


def sum_in_backward(module: nn.Module, summed: bool, *, final: bool) -> None:
    """Whether the next backward sums gradients over the data ranks, else adds them up on this rank.

    final: it is the step's last, after which the current stream waits for all sums. Where shards have
        replicas, sums over these wait for it.
    """
    for unit in _units(module):
        unit.set_requires_gradient_sync(summed, recurse=False)
        unit.set_requires_all_reduce(summed and final, recurse=False)
        unit.set_is_last_backward(final)


def sum_now(module: nn.Module, summed: bool, *, final: bool) -> None:
    """What the end of a backward does (sum_in_backward), for gradients that are there already.

    FSDP has no public call for it. Its callback at the end of a backward does this for the units that no
    backward has gone through, which is all of them here.
    """
    assert isinstance(module, FSDPModule)
    end_of_backward = module._get_fsdp_state()._root_post_backward_final_callback
    # First without a sum: gradients of this and of an earlier moment may have two dtypes, which are added up
    # in that of the sum.
    sum_in_backward(module, False, final=False)
    end_of_backward()
    if summed:
        sum_in_backward(module, True, final=final)
        end_of_backward()


class Phases:
    """Where FSDP takes modules to be: in a forward, in a backward, or in neither.

    It has one such state for all of a module's computations. Two that take turns each need their own, or a
    forward would leave out its hooks where the backward of another micro-batch is. Weights must stay whole.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._at: list[tuple[Any, str]] = []
        for unit in (unit for module in modules for unit in _units(module)):
            state: Any = unit._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            self._at += [(x, "_training_state") for x in (state, *groups) if x is not None]
            if (state._state_ctx, "iter_forward_root") not in self._at:
                self._at.append((state._state_ctx, "iter_forward_root"))

    def save(self) -> list[Any]:
        """The phase of every part."""
        return [getattr(x, name) for x, name in self._at]

    def load(self, saved: list[Any]) -> None:
        """Make these the phases."""
        for (x, name), value in zip(self._at, saved, strict=True):
            setattr(x, name, value)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    """The module and the parts of it that FSDP gathers on their own."""
    return (sub for sub in module.modules() if isinstance(sub, FSDPModule))
