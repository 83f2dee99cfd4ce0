"""One training or evaluation step: the handlers of a schedule's actions on this rank.

Parts have autograd graphs of their own. What enters a part is a detached leaf, whose gradient goes back to
where it came from; parallel.schedule.execute says what each kind of action must do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from encoders.contract import join_batches, pack_items
from encoders.module import RowsMismatch, hidden_shape
from llm.model import LLMBatch
from mm.batch import RankMicrobatch
from mm.blueprint import SINK
from mm.errors import DataError
from mm.feed import Prepared
from mm.job import Job
from parallel.boundary import Pending
from parallel.pipeline import Pipe
from parallel.schedule import Action, Kind, execute
from parallel.schedule.execute import Observe
from parallel.schedule.halves import Kept, backward_input, backward_weight


@dataclass
class StepResult:
    """This rank's share of a step.

    loss: sum of its supervised tokens' losses divided by the step's global count; one replica counts, so that
    summing over ranks gives the loss. seconds: host time by (kind, module).
    """

    loss: float = 0.0
    seconds: dict[tuple[Kind, str], float] = field(default_factory=dict)


OnTokens = Callable[[RankMicrobatch, Tensor], None]
Key = tuple[str, int, int]  # module, stage, micro-batch


def _key(a: Action) -> Key:
    return a.module, a.stage, a.microbatch


def run_step(
    job: Job,
    prepared: Prepared,
    *,
    train: bool,
    on_tokens: OnTokens | None = None,
    observe: Observe | None = None,
) -> StepResult:
    """Run every micro-batch of a prepared step; gradients are left in the modules' parameters.

    on_tokens: called with each micro-batch and its token losses [T] (evaluation), where they are computed.
    observe: called after every action with its Record, for drawings and measurements. Does not update.
    """
    actions = job.blueprint.schedule(prepared.plan.active, train=train).actions(job.rank.rank)
    run = _Run(job, prepared, actions, train, on_tokens)
    for both in job.boundaries.values():
        for boundary in both:
            boundary.stats.reset()
    with torch.set_grad_enabled(train):
        seconds = execute(actions, run.handlers, observe=observe)
    run.finish()
    return StepResult(float(run.loss), seconds)


class _Run:
    """Tensors in flight between the actions of one step."""

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        actions: Sequence[Action],
        train: bool,
        on_tokens: OnTokens | None,
    ) -> None:
        self.job, self.micro, self.supervised = job, prepared.micro, prepared.plan.supervised
        self.active = prepared.plan.active
        self.train, self.on_tokens = train, on_tokens
        self.device, self.dtype = job.rank.device, job.blueprint.dtype
        self.inputs: dict[Key, Tensor] = {}  # hidden states from the stage before, leaves
        self.outputs: dict[Key, Tensor] = {}  # what a part gave, attached to its graph
        self.joint: dict[Key, Tensor] = {}  # outputs of several micro-batches at once, by the first
        self.receiving: dict[tuple[Kind, Key], Callable[[], Tensor]] = {}
        self.crossing: dict[tuple[Kind, str, int], Pending] = {}  # rows and row gradients under way
        self.entries: dict[tuple[str, int], Tensor] = {}  # rows as the language model reads them, leaves
        # From BACKWARD_INPUT to BACKWARD_WEIGHT: what weights' gradients are made of, or the gradient of the
        # output where BACKWARD_WEIGHT goes through the graph again. It does so in a stage's last, since FSDP
        # reduces in a backward of the whole, and where layers are recomputed.
        self.kept: dict[Key, list[Kept]] = {}
        self.gradients: dict[Key, Tensor] = {}
        self.last = {_key(a) for a in actions if a.last}
        self.recomputes = bool(job.blueprint.cfg.train.recompute or job.blueprint.cfg.train.offload)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.handlers = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
            Kind.BOUNDARY_FORWARD: self.boundary_forward,
            Kind.BOUNDARY_BACKWARD: self.boundary_backward,
            Kind.SEND_FORWARD: self.send_forward,
            Kind.RECV_FORWARD: self.recv_forward,
            Kind.SEND_BACKWARD: self.send_backward,
            Kind.RECV_BACKWARD: self.recv_backward,
            Kind.GATHER: self.gather,
            Kind.FREE: self.free,
            Kind.GRAD_SYNC: self.grad_sync,
        }

    def finish(self) -> None:
        """Wait for what is still under way. Every tensor in flight has then found its consumer."""
        for pending in self.crossing.values():
            pending.wait()
        for pipes in self.job.pipes.values():
            for pipe in pipes:
                pipe.finish()
        assert not self.receiving, f"received and never used: {list(self.receiving)}"

    # forward

    def forward(self, action: Action) -> float:
        key = _key(action)
        hidden = None
        if action.stage > 0:
            hidden = self.receiving.pop((Kind.RECV_FORWARD, key))().requires_grad_(self.train)
            self.inputs[key] = hidden
        if action.module == SINK:
            return self._forward_sink(key, hidden)
        ready = time.perf_counter()
        self._forward_source(action, hidden)
        return ready

    def _forward_source(self, action: Action, hidden: Tensor | None) -> None:
        module, keys = action.module, self._covered(action)
        mine = [self.micro[i] for _, _, i in keys]
        part = self._part(keys[0])
        try:
            if hidden is not None:
                out = part(mine[0].items[module], hidden)
            elif len(mine) > 1:
                out = part(join_batches([mb.items[module] for mb in mine]))
            else:
                out = part(mine[0].items[module])
        except RowsMismatch as error:
            names = [name for mb in mine for name in mb.names[module]]
            raise DataError(f"module {module}, sample {names[error.item]}: {error.why}") from error
        values = out if isinstance(out, Tensor) else out.values
        if len(keys) == 1:
            self.outputs[keys[0]] = values
            return
        self.joint[keys[0]] = values
        rows = [mb.edges[module].forward.rows_in for mb in mine]
        self.outputs |= dict(zip(keys, values.detach().split(rows), strict=True))

    def _covered(self, action: Action) -> list[Key]:
        """What a source's action computes: the micro-batches that it spans and that have items."""
        module, stage, first = action.module, action.stage, action.microbatch
        span = range(first, first + action.span)
        return [(module, stage, i) for i in span if action.span == 1 or module in self.active[i]]

    def _forward_sink(self, key: Key, hidden: Tensor | None) -> float:
        i = key[2]
        mb = self.micro[i]
        assert mb.llm is not None
        if hidden is None:
            rows = {m: self._entry(m, i) for m in mb.llm.places}
        else:
            hidden, rows = self._unpack(mb.llm, hidden, key[1])
        ready = time.perf_counter()
        out = self._part(key)(mb.llm, rows) if hidden is None else self._part(key)(mb.llm, rows, hidden)
        if key != self._last_stage(SINK, i):
            # Feature levels that enter later go along; their gradients come back the same way.
            more = [rows[m] for m in self._carried(mb.llm, key[1])]
            self.outputs[key] = (
                torch.cat([out, *(r.flatten(0, 1).to(out.dtype) for r in more)]) if more else out
            )
            return ready
        if self.on_tokens is not None:
            self.on_tokens(mb, out)
        loss = out.sum() / self.supervised
        if self.train:
            self.outputs[key] = loss
        if self.job.counts_loss:
            self.loss += loss.detach()
        return ready

    def _carried(self, batch: LLMBatch, stage: int) -> list[str]:
        """The edges whose rows the language model's stage `stage` passes on."""
        return [m for m in self.job.blueprint.carries(stage) if m in batch.places]

    def _unpack(self, batch: LLMBatch, message: Tensor, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(hidden states, rows by edge) of what a stage after the first was sent."""
        edges = self._carried(batch, stage - 1)
        shapes = [(len(batch.places[m]), *self.job.blueprint.row_shape(m)) for m in edges]
        sizes = [n * levels for n, levels, _ in shapes]
        hidden, *parts = message.split([len(message) - sum(sizes), *sizes])
        return hidden, {m: p.view(s) for m, p, s in zip(edges, parts, shapes, strict=True)}

    def _entry(self, source: str, i: int) -> Tensor:
        """Rows of an encoder as this rank reads them, once they have arrived."""
        rows = self.crossing.pop((Kind.BOUNDARY_FORWARD, source, i)).wait()
        learns = self.train and source not in self.job.blueprint.frozen
        self.entries[source, i] = rows.detach().requires_grad_(learns)
        return self.entries[source, i]

    # backward

    def backward(self, action: Action) -> float:
        keys = self._covered(action)
        self._synchronise(keys[0], action.last)
        outputs = [self.outputs.pop(key) for key in keys]
        grads = [self._output_gradient(key) for key in keys]
        output, grad = outputs[0], grads[0]
        if len(keys) > 1:
            output, grad = self.joint.pop(keys[0]), torch.cat([g for g in grads if g is not None])
        ready = time.perf_counter()
        if output.requires_grad:  # not where the first layers are frozen
            output.backward(grad)
        return ready

    def backward_input(self, action: Action) -> float:
        key = _key(action)
        self._synchronise(key, False)
        output, grad = self.outputs[key], self._output_gradient(key)
        ready = time.perf_counter()
        wanted = [t for t in self._leaves(key) if t.requires_grad]
        again = not wanted or key in self.last or self.recomputes
        self._fsdp(key).set_reshard_after_backward(not again)  # the weights' turn comes
        if not output.requires_grad:
            return ready
        if not again:
            del self.outputs[key]
            self.kept[key] = backward_input(output, grad, wanted)
            return ready
        if wanted:
            output.backward(grad, inputs=wanted, retain_graph=True)
        if grad is not None:
            self.gradients[key] = grad
        return ready

    def backward_weight(self, action: Action) -> None:
        key = _key(action)
        if key in self.kept:
            backward_weight(self.kept.pop(key))
            return
        self._synchronise(key, action.last)
        part, output = self._part(key), self.outputs.pop(key)
        self._fsdp(key).set_reshard_after_backward(action.last)
        self._unshard(key)  # the graph's leaves are the gathered weights
        weights = [p for p in part.parameters() if p.requires_grad]
        if weights and output.requires_grad:
            output.backward(self.gradients.pop(key, None), inputs=weights)

    def _synchronise(self, key: Key, last: bool) -> None:
        """Have FSDP reduce gradients in the stage's last backward of the step, add them up before."""
        part, each = self._fsdp(key), self.job.blueprint.params(key[0]) == "each"
        part.set_requires_gradient_sync(last and each)
        part.set_is_last_backward(last and each)

    # parameters of parts that are gathered once a step

    def gather(self, action: Action) -> None:
        key = _key(action)
        self._fsdp(key).set_reshard_after_backward(False)
        self._unshard(key)

    def _unshard(self, key: Key) -> None:
        for module in self._part(key).modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def free(self, action: Action) -> None:
        for module in self._part(_key(action)).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def grad_sync(self, action: Action) -> None:
        """Have FSDP reduce what all backwards of the step have added up: it does so in a backward, here one
        without items."""
        key = _key(action)
        part, use = self._fsdp(key), self.job.blueprint.inputs.encoders[action.module]
        part.set_requires_gradient_sync(True)
        part.set_is_last_backward(True)
        kw: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self._part(key)(pack_items(use.cls, use.cfg, [], [], **kw)).values.sum().backward()

    def _fsdp(self, key: Key) -> FSDPModule:
        part = self._part(key)
        assert isinstance(part, FSDPModule)
        return part

    def _output_gradient(self, key: Key) -> Tensor | None:
        """The gradient of a part's output, waited for; None for the loss itself."""
        module, _, i = key
        if key != self._last_stage(module, i):
            return self.receiving.pop((Kind.RECV_BACKWARD, key))()
        return None if module == SINK else self.crossing.pop((Kind.BOUNDARY_BACKWARD, module, i)).wait()

    def _leaves(self, key: Key) -> list[Tensor]:
        """What entered a part."""
        if key in self.inputs:
            return [self.inputs[key]]
        return [rows for (_, i), rows in self.entries.items() if key[0] == SINK and i == key[2]]

    # boundaries

    def boundary_forward(self, action: Action) -> None:
        module, i = action.module, action.microbatch
        held = self.outputs.get(self._last_stage(module, i))
        if held is None:  # a rank that only receives
            shape = (0, *self.job.blueprint.row_shape(module))
            held = torch.empty(shape, dtype=self.dtype, device=self.device)
        plan = self.micro[i].edges[module]
        pending = self.job.boundaries[module][0].start_forward(plan, held.detach())
        self.crossing[Kind.BOUNDARY_FORWARD, module, i] = pending

    def boundary_backward(self, action: Action) -> None:
        module, i = action.module, action.microbatch
        rows = self.entries.pop((module, i), None)
        sent = self.crossing.pop((Kind.BOUNDARY_FORWARD, module, i), None)
        if sent is not None:  # a rank without the language model: its rows have long arrived
            sent.wait()
        plan = self.micro[i].edges[module]
        grad = None if rows is None else rows.grad
        if grad is None:
            shape = (0 if rows is None else len(rows), *self.job.blueprint.row_shape(module))
            grad = torch.zeros(shape, dtype=self.dtype, device=self.device)
        pending = self.job.boundaries[module][1].start_backward(plan, grad)
        self.crossing[Kind.BOUNDARY_BACKWARD, module, i] = pending

    def _last_stage(self, module: str, i: int) -> Key:
        return module, len(self.job.blueprint.stages[module]) - 1, i

    # pipelines

    def send_forward(self, action: Action) -> None:
        key = _key(action)
        self._pipe(action, Kind.FORWARD).send(self.outputs[key].detach(), self._peer(action), action.tag)

    def recv_forward(self, action: Action) -> None:
        key = _key(action)
        self._receive(action, Kind.FORWARD, key, self._hidden_shape(key))

    def send_backward(self, action: Action) -> None:
        key = _key(action)
        hidden = self.inputs.pop(key)
        grad = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        self._pipe(action, Kind.BACKWARD).send(grad, self._peer(action), action.tag)

    def recv_backward(self, action: Action) -> None:
        key = _key(action)
        # Of the output, which may not be there yet: what the next stage takes.
        self._receive(action, Kind.BACKWARD, key, self._hidden_shape((key[0], key[1] + 1, key[2])))

    def _receive(self, action: Action, direction: Kind, key: Key, shape: tuple[int, ...]) -> None:
        pipe = self._pipe(action, direction)
        self.receiving[action.kind, key] = pipe.receive(
            shape, self._peer(action), action.tag, dtype=self.dtype, device=self.device
        )

    def _pipe(self, action: Action, direction: Kind) -> Pipe:
        return self.job.pipes[action.module][0 if direction is Kind.FORWARD else 1]

    def _peer(self, action: Action) -> int:
        """The global rank at the other end of a send or receive."""
        layout = self.job.blueprint.layouts[action.module]
        at = layout.coord(self.job.rank.rank)
        assert action.peer is not None
        return layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=action.peer % layout.pp)

    def _hidden_shape(self, key: Key) -> tuple[int, ...]:
        """Shape of what enters a stage, from the plan alone."""
        module, stage, i = key
        axes, mb = self.job.meshes[module].axes, self.micro[i]
        if module == SINK:
            assert mb.llm is not None
            tokens = len(mb.llm.ids) // axes.token_shards
            for m in self._carried(mb.llm, stage - 1):
                tokens += len(mb.llm.places[m]) * self.job.blueprint.row_shape(m)[0]
            return tokens, self.job.blueprint.llm.d_model
        use = self.job.blueprint.inputs.encoders[module]
        where = self.job.blueprint.stages[module][stage]
        return hidden_shape(use.cls, use.cfg, mb.items[module].metas, where, axes)

    def _part(self, key: Key) -> nn.Module:
        return self.job.parts[key[0]][key[1]]
