"""Tensors in flight between the actions of one step on one rank, and the transfers among them.

mm/train/step.py computes; this moves what it computes. Nothing here waits but what reads a transfer's result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from encoders.module import hidden_shape
from mm.plan.blueprint import SINK
from mm.plan.step_plan import Edge
from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from parallel.boundary import Pending
from parallel.comm.pipeline import Pipe
from parallel.schedule import Action, Kind, SchedulePlan
from parallel.schedule.action import BOUNDARY, SENDS
from parallel.schedule.checker.graph import let_go

Key = tuple[str, int, int]  # module, stage, micro-batch
Crossing = tuple[Kind, Edge, int]  # direction, edge, micro-batch


def key_of(action: Action) -> Key:
    """The stage and the micro-batch of a computation or a message."""
    return action.module, action.stage, action.microbatch


@dataclass
class Flight:
    """What one action leaves for another, each until what needs it last.

    inputs: hidden states from the stage before, leaves; outputs: what a part gave, attached to its graph;
    entries: rows as the language model reads them, by (edge, micro-batch), leaves; crossing: rows and their
    gradients under way; receiving: messages of pipelines.
    """

    job: Job
    prepared: Prepared
    schedule: SchedulePlan
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    entries: dict[tuple[Edge, int], Tensor] = field(default_factory=dict)
    crossing: dict[Crossing, Pending] = field(default_factory=dict)
    receiving: dict[tuple[Kind, Key], Callable[[], Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rank = self.job.rank.rank
        self._actions = {a[:4]: a for a in self.schedule.actions(rank) if a.kind in SENDS}
        program = self.schedule.program_of.get(rank)
        self._let_go = {} if program is None else let_go(self.schedule, program)

    def let_go(self, action: Action) -> None:
        """Give back, before a computation, what others have taken by then: the schedule knows."""
        for kind, module, i, stage in self._let_go.get(action[:4], ()):
            if kind in BOUNDARY:
                self.crossing.pop((kind, Edge(module, stage), i)).wait()
                continue
            sent = self._actions[kind, module, i, stage]
            direction = Kind.FORWARD if kind is Kind.SEND_FORWARD else Kind.BACKWARD
            self._pipe(sent, direction).let_go(self._peer(sent), sent.tag)

    def finish(self) -> None:
        """Wait for what is still under way. Every tensor in flight has then found its consumer."""
        for pending in self.crossing.values():
            pending.wait()
        for pipes in self.job.pipes.values():
            for pipe in pipes:
                pipe.finish()
        left = [*self.receiving, *self.inputs, *self.outputs, *self.entries]
        assert not left, f"never used: {left}"

    def last_stage(self, module: str, i: int) -> Key:
        """The last stage of a module in micro-batch i."""
        return module, len(self.job.blueprint.stages[module]) - 1, i

    def learns(self, key: Key) -> bool:
        """Whether a backward of a stage and micro-batch follows."""
        return self.schedule.learns(key[0], key[2])

    # what computations read

    def hidden(self, key: Key) -> Tensor | None:
        """What the stage before gave, waited for, a leaf; None for the first stage."""
        if key[1] == 0:
            return None
        hidden = self.receiving.pop((Kind.RECV_FORWARD, key))()
        if self.learns(key):
            self.inputs[key] = hidden.requires_grad_()
        return hidden

    def rows(self, key: Key) -> dict[str, Tensor]:
        """By encoder, the rows that enter the language model in stage and micro-batch `key`, waited for."""
        _, stage, i = key
        active = self.prepared.plan.active[i]
        edges = [e for e in self.job.blueprint.edges if e.stage == stage and e.source in active]
        return {e.source: self._entry(e, i) for e in edges}

    def _entry(self, edge: Edge, i: int) -> Tensor:
        rows = self.crossing.pop((Kind.BOUNDARY_FORWARD, edge, i)).wait().detach()
        if self.schedule.learns(edge.source, i):
            self.entries[edge, i] = rows.requires_grad_()
        return rows

    def leaves(self, key: Key) -> list[Tensor]:
        """What entered a part."""
        rows = [x for (edge, j), x in self.entries.items() if (SINK, edge.stage, j) == key]
        return [*([self.inputs[key]] if key in self.inputs else []), *rows]

    def output_gradient(self, key: Key) -> Tensor | None:
        """The gradient of a part's output, waited for; None for the loss itself."""
        module, _, i = key
        if key != self.last_stage(module, i):
            return self.receiving.pop((Kind.RECV_BACKWARD, key))()
        return None if module == SINK else self._row_gradient(module, i)

    def _row_gradient(self, module: str, i: int) -> Tensor:
        """Of an encoder's rows [R, d] or [R, levels, d]: the levels come back from where they entered."""
        edges = {e: levels for e, levels in self.job.blueprint.edges.items() if e.source == module}
        parts = [self.crossing.pop((Kind.BOUNDARY_BACKWARD, e, i)).wait() for e in edges]
        if len(parts) == 1:
            return parts[0]
        grad = parts[0].new_empty(len(parts[0]), *self.job.blueprint.row_shape(module))
        for part, levels in zip(parts, edges.values(), strict=True):
            grad[:, list(levels)] = part
        return grad

    # boundaries

    def boundary_forward(self, action: Action) -> None:
        edge, i = Edge(action.module, action.stage), action.microbatch
        held = self._held(edge, i)
        plan = self.prepared.micro[i].edges[edge]
        pending = self.job.boundaries[edge].forward.start_forward(plan, held)
        self.crossing[Kind.BOUNDARY_FORWARD, edge, i] = pending

    def boundary_backward(self, action: Action) -> None:
        edge, i = Edge(action.module, action.stage), action.microbatch
        rows = self.entries.pop((edge, i), None)
        plan = self.prepared.micro[i].edges[edge]
        grad = self._no_rows(edge) if rows is None else rows.grad
        if grad is None:
            assert rows is not None
            grad = torch.zeros_like(rows)
        pending = self.job.boundaries[edge].backward.start_backward(plan, grad)
        self.crossing[Kind.BOUNDARY_BACKWARD, edge, i] = pending

    def _held(self, edge: Edge, i: int) -> Tensor:
        """This rank's rows of the levels that travel along an edge; none where it only receives."""
        key = self.last_stage(edge.source, i)
        held = self.outputs.get(key)
        if held is None:
            return self._no_rows(edge)
        if not self.learns(key) and edge.stage == self.job.blueprint.enters(edge.source)[-1]:
            del self.outputs[key]  # no other edge and no backward reads it
        levels, held = self.job.blueprint.edges[edge], held.detach()
        return held[:, list(levels)] if held.ndim > 2 and len(levels) < held.shape[1] else held

    def _no_rows(self, edge: Edge) -> Tensor:
        blueprint = self.job.blueprint
        shape = (0, *blueprint.entry_shape(edge))
        return torch.empty(shape, dtype=blueprint.dtype, device=self.job.rank.device)

    # pipelines

    def send_forward(self, action: Action) -> None:
        key = key_of(action)
        output = (self.outputs[key] if self.learns(key) else self.outputs.pop(key)).detach()
        self._pipe(action, Kind.FORWARD).send(output, self._peer(action), action.tag)

    def recv_forward(self, action: Action) -> None:
        key = key_of(action)
        self._receive(action, Kind.FORWARD, key, self._hidden_shape(key))

    def send_backward(self, action: Action) -> None:
        hidden = self.inputs.pop(key_of(action))
        grad = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        self._pipe(action, Kind.BACKWARD).send(grad, self._peer(action), action.tag)

    def recv_backward(self, action: Action) -> None:
        module, stage, i = key = key_of(action)
        # Of the output, which may not be there yet: what the next stage takes.
        self._receive(action, Kind.BACKWARD, key, self._hidden_shape((module, stage + 1, i)))

    def _receive(self, action: Action, direction: Kind, key: Key, shape: tuple[int, ...]) -> None:
        self.receiving[action.kind, key] = self._pipe(action, direction).receive(
            shape,
            self._peer(action),
            action.tag,
            dtype=self.job.blueprint.dtype,
            device=self.job.rank.device,
        )

    def _pipe(self, action: Action, direction: Kind) -> Pipe:
        pipes = self.job.pipes[action.module]
        return pipes.forward if direction is Kind.FORWARD else pipes.backward

    def _peer(self, action: Action) -> int:
        """The global rank at the other end of a send or receive."""
        layout = self.job.blueprint.layouts[action.module]
        at = layout.coord(self.job.rank.rank)
        assert action.peer is not None
        return layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=action.peer % layout.pp)

    def _hidden_shape(self, key: Key) -> tuple[int, ...]:
        """Shape of what enters a stage, from the plan alone."""
        module, stage, i = key
        axes, mb = self.job.meshes[module].axes, self.prepared.micro[i]
        if module == SINK:
            assert mb.llm is not None
            return len(mb.llm.ids) // axes.token_shards, self.job.blueprint.llm.d_model
        use = self.job.blueprint.inputs.encoders[module]
        where = self.job.blueprint.stages[module][stage]
        return hidden_shape(use.cls, use.cfg, mb.items[module].metas, where, axes)
