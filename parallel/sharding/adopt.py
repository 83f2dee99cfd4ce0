"""Ordinary modules, taken as they are: their parameters are declared with their present values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from parallel.sharding.param import Given, ParamSpec, own_specs, seeded, set_spec


def adopt(
    made: nn.Module | Callable[[], nn.Module],
    *,
    key: str | None = None,
    partial: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Declare every undeclared parameter below a module with its present value, in place; return the module.

    Adopted parameters are replicated over tp, and FSDP shards them like any others. Buffers stay, tied
    parameters stay tied, and parameters with requires_grad=False are never trained.

    made: the module, not on the meta device; or a function that makes it, which needs `key`.
    key: the module's name in the module that it becomes part of. It seeds torch's generator while `made`
        runs, so the values do not depend on what was made before. A module of a pipeline stage needs this,
        because ranks of other stages make other modules.
    partial: True where tp ranks run the module on different tokens or heads, inside a block whose weights tp
        shards. The gradients are then summed over tp. Sequence parallelism between blocks does not need it.
    device: where the parameters go. On the meta device their values are kept aside until materialise().
    dtype: of the floating parameters, and of floating buffers that it holds without loss. None: unchanged.

    Raises ValueError for a parameter without a value, and for layers whose output would depend on the layout:
    dropout, and batch norm that is not in eval mode.
    """
    if not isinstance(made, nn.Module):
        if key is None:
            raise ValueError(
                "adopt() of a function needs key=, the module's name in the module that it becomes part of"
            )
        with seeded(key, torch.initial_seed()):
            made = made()
    # New parameters and buffers by the id of the old, so ties stay.
    taken: dict[int, nn.Parameter] = {}
    moved: dict[int, Tensor] = {}
    for prefix, sub in made.named_modules():
        _check(f"{type(made).__name__}{'.' if prefix else ''}{prefix}", sub)
        declared = own_specs(sub)
        for name, param in list(sub.named_parameters(recurse=False, remove_duplicate=False)):
            if name in declared:
                continue
            value = _cast(param.detach(), dtype, exact=False)
            if id(param) not in taken:
                new = value if device is None else value.to(device)
                taken[id(param)] = nn.Parameter(new, requires_grad=param.requires_grad)
            setattr(sub, name, taken[id(param)])
            given = Given(value, keyed=key is not None)
            matrix = not isinstance(sub, nn.Embedding)
            spec = ParamSpec(given, partial=partial, trained=param.requires_grad, matrix=matrix)
            set_spec(sub, name, spec)
        for name, buffer in list(sub.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(sub, name, moved.setdefault(id(buffer), _cast(buffer, dtype, exact=True)))
    return made


def _check(where: str, sub: nn.Module) -> None:
    """Raise ValueError for a submodule that cannot be adopted. where: its name in messages."""
    for name, param in sub.named_parameters(recurse=False):
        if name not in own_specs(sub) and (is_lazy(param) or param.is_meta):
            why = "has no shape before its first batch" if is_lazy(param) else "is on the meta device"
            raise ValueError(
                f"adopt(): parameter {name} of {where} {why}, so it has no value to keep; needed: a module "
                "made whole on the CPU"
            )
    dropout = (
        sub.p if isinstance(sub, _DropoutNd) else sub.dropout if isinstance(sub, nn.MultiheadAttention) else 0
    )
    if dropout and sub.training:
        raise ValueError(
            f"adopt(): {where} drops values at random (p={dropout:g}), different ones on each rank, so "
            "training would depend on the layout; needed: p=0 (often the option dropout=0.0 of the enclosing "
            "module)"
        )
    if isinstance(sub, _BatchNorm) and sub.training:
        raise ValueError(
            f"adopt(): {where} is a batch norm over the items that a rank happens to have, so training would "
            "depend on the layout; needed: eval() on it, which uses its running averages, or a layer or "
            "group norm"
        )


def _cast(tensor: Tensor, dtype: torch.dtype | None, *, exact: bool) -> Tensor:
    """A floating tensor in `dtype`, any other unchanged. exact: cast only where `dtype` holds every value."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor if exact and torch.promote_types(tensor.dtype, dtype) != dtype else tensor.to(dtype)


def check_given(given: Mapping[str, Tensor], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise ValueError naming the parameters whose given values differ between ranks of `group`.

    given: values by parameter name. Collective over `group`: each rank passes the same names in the same
        order. None is a group of one rank.
    """
    if not given or group is None:
        return
    digests = torch.tensor([_digest(v) for v in given.values()], dtype=torch.int64, device=device)
    # One reduction for both bounds: the maximum of the negated digests is the negated minimum.
    both = torch.cat([digests, -digests])
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    highest, lowest = both.chunk(2)
    wrong = [name for name, differs in zip(given, (highest != -lowest).tolist(), strict=True) if differs]
    if wrong:
        raise ValueError(
            f"adopted parameters differ between ranks: {', '.join(wrong[:3])}{', ..' if wrong[3:] else ''} "
            f"({len(wrong)} of {len(given)}); needed: values from a file or from torch's generator, which is "
            "seeded alike on all ranks while a module is made"
        )


def _digest(values: Tensor) -> int:
    """56 bits of the sha256 of a tensor's bytes, which an int64 holds with either sign."""
    data = values.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")
