"""Watches a step: every operation, with the storages, kernels, calls and host waits that come with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import _make_grads, _tensor_or_tensors_to_tuple
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm.virtual.calls import DoneWork, Given, read_call, result, size_of, values_after
from mm.virtual.kernels import Kernels, is_kernel
from mm.virtual.ledger import Ledger, Moment
from mm.virtual.records import Call, Exchanged, Part, Trace
from mm.virtual.source import Site, site
from mm.virtual.values import Values, give, value_of
from mm.virtual.waits import HostWaits, is_pinned, pin

_aten = torch.ops.aten
_PASSED = ("prim", "profiler")
_DEVICE = torch.ops.prim.device.default
_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor}
Names = Callable[[dist.ProcessGroup], str]
# The one place that reads floats: losses and squared norms of all ranks, which are 1 there. They decide that
# the step is finite, and whether gradients are clipped: they are where the sum of a one per rank and module
# is more than train.clip.
MESSAGE = "mm/ranks/control.py"


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Records what a rank does while it is entered.

    values: runs operations on fake tensors; None where tensors and process groups are real.
    names: what a process group is called.
    node_size: ranks of a machine, None where one has all.
    gave: by rank, what it has given to collectives in an earlier trace.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        *,
        values: Values | None,
        names: Names,
        node_size: int | None = None,
        gave: Mapping[int, Exchanged] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.rank, self.values = device, rank, values
        self.names, self.node_size = names, node_size
        self.gave = gave or {}
        self.exchanged: dict[tuple[str, tuple[int, ...]], list[np.ndarray]] = {}
        self.ledger = Ledger(device)
        self.kernels, self.waits = Kernels(device), HostWaits(device)
        self.calls: list[Call] = []
        self.call_waits: list[tuple[int, int]] = []
        self.sums: Mapping[str, tuple[tuple[Part, ...], ...]] = {}  # of Trace; the caller sets it
        self.recording = False  # whether storages and kernels are: not while the job is built
        self._at = 0
        self._batch: object = None  # the call of batch_isend_irecv() that starts messages now
        self._batches = 0
        self._works: list[dist.Work] = []
        self._members: dict[str, tuple[int, ...]] = {}
        self._kernel: dict[Any, bool] = {}
        self._reading = False  # whether a tolist() under way has been counted

    def forget(self) -> None:
        """Drop the calls so far, those of the building of a job; the step's come next."""
        for found in (self.calls, self.call_waits, self._works, self._members, self.exchanged):
            found.clear()
        self._at = 0

    def trace(self, world: int, notes: tuple[str, ...]) -> Trace:
        """All that was recorded."""
        return Trace(
            rank=self.rank,
            world=world,
            memory=self.ledger.memory(),
            calls=tuple(self.calls),
            waits=tuple(self.call_waits),
            kernels=self.kernels.all(),
            host_waits=self.waits.all(),
            groups=dict(self._members),
            exchanged=self.exchanged,
            sums=self.sums,
            notes=notes,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device  # most of all calls: autograd asks for the device of all it handles
        kwargs = kwargs or {}
        self._batch = None if func.namespace != "c10d" else self._batch
        if not _PLAIN.issuperset(types):
            return NotImplemented  # of DTensors: what they do on local tensors comes here next
        if func.namespace in _PASSED:
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._call(func, args, kwargs)
        if func is _aten.is_pinned.default and self.values is not None:
            return is_pinned(args[0])
        given = _tensors(args, kwargs)
        if self.values is not None and self._on_host(given, kwargs):
            with unset_fake_temporarily():
                return self._host(func, args, kwargs)
        if func is _aten.unbind.int and _depth("tolist") == 1:
            self._reading = False  # another tolist() begins
        if self.recording:
            why = self.waits.why(func, args, kwargs, given)
            if why:
                self._wait(why)
        if self.values is None:
            out = func(*args, **kwargs)
        elif func is _aten._local_scalar_dense.default:
            return _scalar(args[0])
        elif func is _aten._pin_memory.default:
            out = self.values.run(_aten.clone.default, (args[0],), {})
            pin(out)
        else:
            out = self.values.run(func, args, kwargs)
        if self.recording:
            self._count(func, args, kwargs, given, out)
        return out

    def _on_host(self, given: list[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether an operation is as it is in a real job: on meta tensors, or, next to an accelerator, on the
        host. Where the device is the host, its tensors are fake like all."""
        to = kwargs.get("device")
        to = None if to is None else torch.device(to).type
        accelerated = self.device.type != "cpu"
        if not given:
            return to == "meta" or (accelerated and to in (None, "cpu"))
        if (to is not None and to == self.device.type) or any(isinstance(t, FakeTensor) for t in given):
            return False
        return accelerated or all(t.is_meta for t in given)

    def _host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not _aten._pin_memory.default:
            return func(*args, **kwargs)
        pinned = args[0].clone()
        pin(pinned)
        return pinned

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], out: Any) -> None:
        if self.waits.phase == "data":
            return
        made = [out] if isinstance(out, Tensor) else _tensors((out,), {})
        name = func._schema.name
        for x in made:
            self.ledger.made(x, name, site)
        kernel = self._kernel.get(func)
        if kernel is None:
            kernel = self._kernel[func] = is_kernel(func)
        if kernel:
            self.kernels.add(self.ledger.now.module, func, given, made, (args, kwargs, out))
        if func.namespace == "fsdp":
            self.ledger.look_again()

    def _wait(self, why: str) -> None:
        inside = why == "read" and _depth("tolist") > 0
        if not (inside and self._reading):
            self.waits.add(why, site())
        self._reading = inside

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = read_call(func, args, kwargs)
        self._record(given)
        if self.values is None:
            return func(*args, **kwargs)
        self._exchange(given)
        number = len(self.calls) - 1
        work = DoneWork(lambda: self._waited(number))
        self._works.append(work)  # torch itself keeps no Python object alive
        return result(func, given, args, work)

    def _record(self, given: Given) -> None:
        name = given.group.group_name
        if name not in self._members:
            self._members[name] = tuple(dist.get_process_group_ranks(given.group))
        members = self._members[name]
        if given.peer is not None:
            members = (self.rank, given.peer) if given.op == "send" else (given.peer, self.rank)
        size, dtype = size_of(given)
        call = Call(
            op=given.op,
            group=self.names(given.group),
            members=members,
            bytes=size,
            dtype=dtype,
            crosses_nodes=self._crosses(members),
            communicator=name,
            peer=given.peer,
            sends=given.sends,
            receives=given.receives,
            during=self.ledger.now.action,
            posted=given.posted or given.peer is not None,
            tag=given.tag,
            batch=None if given.peer is None else self._batch_number(),
            at=self._at,
        )
        self._at += 1
        self.calls.append(call)

    def _batch_number(self) -> int | None:
        """The number of the batch of messages that is being started."""
        batch = _caller("batch_isend_irecv")
        if batch is not None and batch is not self._batch:
            self._batches += 1
        self._batch = batch
        return None if batch is None else self._batches

    def _waited(self, number: int) -> None:
        self.call_waits.append((self._at, number))
        self._at += 1

    def _crosses(self, members: tuple[int, ...]) -> bool:
        n = self.node_size
        return n is not None and min(members) // n != max(members) // n

    def _exchange(self, given: Given) -> None:
        """Give the output of a collective its values, where those of its input are known."""
        if len(given.inputs) != 1 or len(given.outputs) != 1:
            return
        mine, out = value_of(given.inputs[0]), given.outputs[0]
        old, value = value_of(out), None
        with _plain():
            if mine is not None:
                members = self._held_by_members(given, mine)
                value = values_after(given, members, dist.get_rank(given.group), out.shape)
            if value is not None and old is not None:
                old.copy_(value)
        if value is not None and old is None:
            give(out, value)
        elif value is None and old is not None:
            old.untyped_storage()._stale = True  # type: ignore[attr-defined]

    def _held_by_members(self, given: Given, mine: Tensor) -> list[Tensor]:
        """The values of the input on each member: as they gave, else as here."""
        ranks = self._members[given.group.group_name]
        key = self.names(given.group), ranks
        if mine.dtype != torch.int64:
            return [mine] * len(ranks)
        sent = self.exchanged.setdefault(key, [])
        sent.append(mine.numpy().copy())
        number, out = len(sent) - 1, []
        for r in ranks:
            theirs = self.gave.get(r, {}).get(key, ())
            known = r != self.rank and number < len(theirs) and theirs[number].shape == tuple(mine.shape)
            out.append(torch.from_numpy(theirs[number]) if known else mine)
        return out

    def moment(self, moment: Moment) -> None:
        """The rank goes on to something else."""
        self.ledger.look_again()
        self.ledger.now = moment


class Stands(TorchFunctionMode):
    """What the accelerator has and its stand-in lacks: numpy() of a fake tensor that has values, which no
    operation shows, and fused attention, for which torch asks what the device's library can do."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.fused = device.type != "cpu"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            return _numpy(args[0])
        if func is F.scaled_dot_product_attention and self.fused:
            return fused_attention(*args, **(kwargs or {}))
        if func is torch.autograd.backward:
            return self._backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _backward(self, tensors: Any, grads: Any = None, retain_graph: bool = False, **named: Any) -> None:
        """torch.autograd.backward(), in which this mode holds too: layers that are computed again meet it."""
        outputs = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = _tensor_or_tensors_to_tuple(named.pop("grad_tensors", grads), len(outputs))
        started = _make_grads(outputs, given, is_grads_batched=False)
        keep = bool(retain_graph or named.pop("retain_graph", False))
        inputs = tuple(named.pop("inputs", None) or ())
        create = bool(named.pop("create_graph", False))
        assert not named, named
        with self:
            _engine_run_backward(
                outputs, started, keep, create, inputs, allow_unreachable=True, accumulate_grad=True
            )


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Attention [B, H, L, D] as CUDA runs it, with the arguments of scaled_dot_product_attention(): flash
    attention, with a mask or in float32 the kernel called efficient, which repeats shared heads."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | named
    mask, scale = given.get("attn_mask"), given.get("scale")
    kind = {"dropout_p": given.get("dropout_p", 0.0), "is_causal": given.get("is_causal", False)}
    if mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = _aten._scaled_dot_product_flash_attention(q, k, v, **kind, scale=scale)[0]
        return out
    if given.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bias = None if mask is None else mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    kept = torch.is_grad_enabled()
    fused: Tensor = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, kept, **kind, scale=scale)[0]
    return fused


def _numpy(x: Tensor) -> np.ndarray:
    value = value_of(x)
    if value is not None:
        with _plain():
            return np.array(value.numpy(), copy=True)
    at = site()
    if at.file != MESSAGE or not x.dtype.is_floating_point:
        raise _unknown(at, x)
    return np.ones(tuple(x.shape))


def _plain() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _scalar(x: Tensor) -> Any:
    """The value of a tensor of one element."""
    value = value_of(x)
    if value is None:
        raise _unknown(site(), x)
    with _plain():
        return value.item()


def _unknown(at: Site, x: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{at.file}:{at.line} reads a value that depends on data, {x.dtype} and nothing stands in for it; "
        "only what follows from the choice of experts, or from the plan, has values"
    )


def _depth(name: str) -> int:
    """How many calls of a function of this name are under way near by. No frame is kept: it would keep what
    its callers hold."""
    frame: FrameType | None = sys._getframe(2)
    found = 0
    for _ in range(16):
        if frame is None:
            break
        found += frame.f_code.co_name == name
        frame = frame.f_back
    return found


def _caller(name: str) -> object:
    """The call of a function of this name that is under way near by, None where there is none."""
    frame: FrameType | None = sys._getframe(2)
    found = None
    for _ in range(12):
        if frame is None:
            break
        if frame.f_code.co_name == name:
            found = frame
        frame = frame.f_back
    return found


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += _tensors(x, {})
    return found
