"""Backward computations of one step: whole, or in two halves (inputs first, weights later)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mm.config.training import recomputed
from mm.train.flight import Flight, Key, key_of
from mm.train.trail import Trail
from mm.train.transfer import Transfers
from mm.train.weights import Weights
from parallel.schedule import Action
from parallel.schedule.executor.halves import backward_input, backward_weight


class Backward:
    """Handlers of BACKWARD, BACKWARD_INPUT and BACKWARD_WEIGHT."""

    def __init__(self, flight: Flight, transfers: Transfers, weights: Weights, trail: Trail | None) -> None:
        self.flight, self.transfers, self.weights, self.trail = flight, transfers, weights, trail
        blueprint = flight.job.blueprint
        train = blueprint.cfg.train
        self._recomputes = {m for m in blueprint.modules if train.offload or recomputed(train, m)}

    def backward(self, action: Action) -> float:
        """Gradients of a stage's weights and of what entered it; returns when its output's gradient came."""
        keys = [key_of(action)] if self.flight.joins(action) else self.flight.covered(action)
        self.weights.before_backward(action)
        self.transfers.release(action)
        outputs = [self.flight[key].output.take() for key in keys]
        grads = [self.transfers.output_gradient(key) for key in keys]
        output, grad = outputs[0], grads[0]
        if len(keys) > 1:
            output = self.flight[keys[0]].joint_output.take()
            grad = torch.cat([g for g in grads if g is not None])
        ready = time.perf_counter()
        if output.requires_grad:  # not where the first layers are frozen
            _backward(output, grad)
        self._note(keys, grads)
        return ready

    def backward_input(self, action: Action) -> float:
        """Gradients of what entered a stage; keeps what those of its weights need."""
        key = key_of(action)
        record = self.flight[key]
        self.transfers.release(action)
        grad = self.transfers.output_gradient(key)
        ready = time.perf_counter()
        leaves = [t for t in record.leaves() if t.requires_grad]
        weights_follow = key.module not in self.flight.job.blueprint.frozen
        # BACKWARD_WEIGHT goes through the graph again where layers are recomputed or nothing is to be done
        # first.
        again = weights_follow and (not leaves or key.module in self._recomputes)
        self.weights.before_inputs(key, again)
        if not weights_follow:
            output = record.output.take()
            if leaves:
                _backward(output, grad, leaves)
            self._note([key], [grad])
            return ready
        held = record.output.peek()
        assert held is not None
        if not held.requires_grad:
            return ready
        if not again:
            record.products.fill(backward_input(record.output.take(), grad, leaves))
            self._note([key], [grad])
            return ready
        if leaves:
            _backward(held, grad, leaves, retain_graph=True)
        if grad is not None:
            record.gradient.fill(grad)
        self._note([key], [grad])
        return ready

    def _note(self, keys: Sequence[Key], grads: Sequence[Tensor | None]) -> None:
        """Note the gradients that a computation took, and what it left in the leaves that entered it."""
        if self.trail is not None:
            leaves = (leaf for key in keys for leaf in self.flight[key].leaves())
            self.trail.backward(keys, grads, [leaf.grad for leaf in leaves])

    def backward_weight(self, action: Action) -> None:
        """Gradients of a stage's weights, from what backward_input() has kept."""
        key = key_of(action)
        record = self.flight[key]
        self.transfers.release(action)
        products = record.products.take_if_filled()
        if products is not None:
            backward_weight(products)
            self.weights.after_weights(action)
            return
        self.weights.before_backward(action)
        output, grad = record.output.take(), record.gradient.take_if_filled()
        self.weights.unshard(key)  # the graph's leaves are the gathered weights
        weights = [p for p in self.flight.part(key).parameters() if p.requires_grad]
        if weights and output.requires_grad:
            _backward(output, grad, weights)


def _backward(
    output: Tensor, grad: Tensor | None, inputs: Sequence[Tensor] | None = None, *, retain_graph: bool = False
) -> None:
    """Tensor.backward, which has no types. inputs: the only leaves that get a gradient, None: all of them."""
    torch.autograd.backward(output, grad, retain_graph=retain_graph, inputs=inputs)
