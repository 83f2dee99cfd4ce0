"""Transfers of one step: pipeline messages within a module, and boundaries between modules.

Their actions only put transfers under way. The computation that reads a transfer's result waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoders.module import hidden_shape
from mm.config.outline import SINK
from mm.plan.step_plan import Edge
from mm.plan.trained import trained_below
from mm.train.flight import Flight, Key, Message, key_of
from parallel.comm.pipeline import Pipe
from parallel.schedule import Action, Kind
from parallel.schedule.action import SENDS
from parallel.schedule.checker.graph import releases
from parallel.topology.directions import Directions


class Transfers:
    """Handlers of sends, receives and boundaries, and what computations read of them."""

    def __init__(self, flight: Flight) -> None:
        self.flight, self.job, self.prepared = flight, flight.job, flight.prepared
        schedule, rank = flight.schedule, flight.job.rank.rank
        self._sends = {a[:4]: a for a in schedule.actions(rank) if a.kind in SENDS}
        program = schedule.program_of.get(rank)
        # By computation, the transfers whose tensors are free before it: the schedule knows.
        self._released = {} if program is None else releases(schedule, program)

    def release(self, action: Action) -> None:
        """Before a computation, free what other ranks have taken by then."""
        for kind, module, i, stage in self._released.get(action[:4], ()):
            if kind is Kind.BOUNDARY_FORWARD:
                self.flight[Key(SINK, stage, i)].row_transfers.pop(module).wait()
            elif kind is Kind.BOUNDARY_BACKWARD:
                self.flight[self.flight.last_stage(module, i)].gradient_transfers.pop(stage).wait()
            else:
                sent = self._sends[kind, module, i, stage]
                pipes = self._pipes(sent)
                pipe = pipes.forward if kind is Kind.SEND_FORWARD else pipes.backward
                pipe.release(self._peer(sent), sent.tag)

    def finish(self) -> None:
        """Wait for what is still under way after the last action."""
        self.flight.finish()
        for pipes in self.job.pipes.values():
            for pipe in pipes:
                pipe.finish()

    # what computations read

    def hidden(self, action: Action) -> Tensor | None:
        """What a forward reads of the stage before, waited for, a leaf; None for the first stage."""
        if action.stage == 0:
            return None
        record = self.flight[key_of(action)]
        hidden = record.hidden_message.take()()
        if not self.flight.learns_from(action):
            return hidden
        # Without a gradient frozen layers keep nothing; the stage before gets zeros, which it ignores.
        below = trained_below(self.job.blueprint, action.module, action.stage)
        return record.hidden.fill(hidden.requires_grad_(below))

    def rows(self, key: Key) -> dict[str, Tensor]:
        """By encoder, the rows that enter the language model in a stage and micro-batch, waited for."""
        record, active = self.flight[key], self.prepared.plan.active[key.microbatch]
        out = {}
        for edge in self.job.blueprint.edges:
            if edge.stage == key.stage and edge.source in active:
                rows = record.row_transfers.pop(edge.source).wait().detach()
                if self.flight.schedule.learns(edge.source, key.microbatch):
                    record.rows[edge.source] = rows.requires_grad_()
                out[edge.source] = rows
        return out

    def output_gradient(self, key: Key) -> Tensor | None:
        """The gradient of a stage's output, waited for; None where the output is the loss."""
        if self.flight.is_loss(key):
            return None
        if key == self.flight.last_stage(key.module, key.microbatch):
            return self._row_gradient(key)
        return self.flight[key].gradient_message.take()()

    def _row_gradient(self, key: Key) -> Tensor:
        """Of an encoder's rows [R, d] or [R, levels, d]: each level's comes from where it entered."""
        blueprint, transfers = self.job.blueprint, self.flight[key].gradient_transfers
        edges = {e: levels for e, levels in blueprint.edges.items() if e.source == key.module}
        parts = [transfers.pop(edge.stage).wait() for edge in edges]
        if len(parts) == 1:
            return parts[0]
        grad = parts[0].new_empty(len(parts[0]), *blueprint.row_shape(key.module))
        for part, levels in zip(parts, edges.values(), strict=True):
            for level, own in zip(levels, part.unbind(1), strict=True):  # a list of them would be uploaded
                grad[:, level] = own
        return grad

    # boundaries

    def boundary_forward(self, action: Action) -> None:
        """Start sending an encoder's rows to the stage of the language model that they enter."""
        edge, i = Edge(action.module, action.stage), action.microbatch
        held = self._held(edge, i)
        boundary = self.job.boundaries[edge].forward
        pending = boundary.start_forward(self.prepared.micro[i].edges[edge], held)
        self.flight[Key(SINK, edge.stage, i)].row_transfers[edge.source] = pending

    def boundary_backward(self, action: Action) -> None:
        """Start sending the gradients of the same rows back."""
        edge, i = Edge(action.module, action.stage), action.microbatch
        rows = self.flight[Key(SINK, edge.stage, i)].rows.pop(edge.source, None)
        grad = self._no_rows(edge) if rows is None else _gradient(rows)
        boundary = self.job.boundaries[edge].backward
        pending = boundary.start_backward(self.prepared.micro[i].edges[edge], grad)
        source = self.flight[self.flight.last_stage(edge.source, i)]
        source.gradient_transfers[edge.stage] = pending

    def _held(self, edge: Edge, i: int) -> Tensor:
        """This rank's rows of the levels that travel along an edge; none where it only receives."""
        key = self.flight.last_stage(edge.source, i)
        output = self.flight[key].output
        held = output.peek()
        if held is None:
            return self._no_rows(edge)
        if not self.flight.learns(key) and edge.stage == self.job.blueprint.enters(edge.source)[-1]:
            output.take()  # no other edge and no backward reads it
        levels, held = self.job.blueprint.edges[edge], held.detach()
        if held.ndim == 2 or len(levels) == held.shape[1]:
            return held
        return torch.stack([held[:, level] for level in levels], 1)

    def _no_rows(self, edge: Edge) -> Tensor:
        blueprint = self.job.blueprint
        shape = (0, *blueprint.entry_shape(edge))
        return torch.empty(shape, dtype=blueprint.dtype, device=self.job.rank.device)

    # pipelines

    def send_forward(self, action: Action) -> None:
        """Start sending a stage's output to the next stage."""
        key = key_of(action)
        slot = self.flight[key].output
        output = slot.peek() if self.flight.learns_from(action) else slot.take()
        assert output is not None
        self._pipes(action).forward.send(output.detach(), self._peer(action), action.tag)

    def recv_forward(self, action: Action) -> None:
        """Start receiving the states that enter a stage."""
        key = key_of(action)
        message = self._receive(self._pipes(action).forward, action, self._hidden_shape(action, key.stage))
        self.flight[key].hidden_message.fill(message)

    def send_backward(self, action: Action) -> None:
        """Start sending the gradient of what entered a stage to the stage before."""
        grad = _gradient(self.flight[key_of(action)].hidden.take())
        self._pipes(action).backward.send(grad, self._peer(action), action.tag)

    def recv_backward(self, action: Action) -> None:
        """Start receiving the gradient of a stage's output, which may not be there yet."""
        key = key_of(action)
        shape = self._hidden_shape(action, key.stage + 1)  # what the next stage takes
        message = self._receive(self._pipes(action).backward, action, shape)
        self.flight[key].gradient_message.fill(message)

    def _receive(self, pipe: Pipe, action: Action, shape: tuple[int, ...]) -> Message:
        dtype, device = self.job.blueprint.dtype, self.job.rank.device
        return pipe.receive(shape, self._peer(action), action.tag, dtype=dtype, device=device)

    def _pipes(self, action: Action) -> Directions[Pipe]:
        return self.job.pipes[action.module]

    def _peer(self, action: Action) -> int:
        """The global rank at the other end of a send or receive."""
        layout = self.job.blueprint.layouts[action.module]
        at = layout.coord(self.job.rank.rank)
        assert action.peer is not None
        return layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=action.peer % layout.pp)

    def _hidden_shape(self, action: Action, index: int) -> tuple[int, ...]:
        """Shape of what enters stage number `index` for what an action covers, from the plan alone."""
        module, micro = action.module, self.prepared.micro
        axes = self.job.meshes[module].axes
        if module == SINK:
            text = micro[action.microbatch].llm
            assert text is not None
            return len(text.ids) // axes.token_shards, self.job.blueprint.llm.d_model
        use = self.job.blueprint.inputs.encoders[module]
        metas = [m for key in self.flight.covered(action) for m in micro[key.microbatch].items[module].metas]
        return hidden_shape(use.cls, use.cfg, metas, self.job.blueprint.stages[module][index], axes)


def _gradient(leaf: Tensor) -> Tensor:
    """The gradient of a leaf, zeros where nothing that learns has read it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
