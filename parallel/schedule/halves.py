"""A backward in two halves: gradients of what entered a graph first, of its weights later (arXiv 2401.10241).

Autograd can be asked for some gradients alone, but asked for the rest later it goes through the whole graph a
second time. So the first half keeps, of every matrix product with a weight, the other factor and the gradient
of the result, which is all that the second half needs, and gives back the rest of the graph. Weights that are
used otherwise (norms, convolutions, in autograd functions of our own) get their gradients in the first half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Matrix products a @ b by their autograd nodes: where a is among the inputs, b being the next, and under what
# names the node keeps the two.
_PRODUCTS = {
    "MmBackward0": (0, "_saved_self", "_saved_mat2"),
    "AddmmBackward0": (1, "_saved_mat1", "_saved_mat2"),
}


@dataclass(frozen=True)
class Kept:
    """What a weight's gradient in a product is made of. edge: where it goes; left, right: its factors."""

    edge: GradientEdge
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class _Product:
    """A product with a weight. second: the weight is its second factor; leaves: that it is made of."""

    node: Any
    edge: GradientEdge
    other: str
    second: bool
    leaves: frozenset[Any]

    def keep(self, into: list[Kept], grads: Sequence[Tensor | None]) -> None:
        """Called with the gradient of the product, before its node passes it on."""
        grad, other = grads[0], getattr(self.node, self.other)
        if grad is not None:
            left, right = (other.mT, grad) if self.second else (grad, other.mT)
            into.append(Kept(self.edge, left, right))


def backward_input(output: Tensor, grad: Tensor | None, inputs: Sequence[Tensor]) -> list[Kept]:
    """Add gradients of `output` to the leaves `inputs`; returns what backward_weight needs for the others.

    grad: of `output`; None for a scalar's own. The graph can be used no more. Its saved tensors must allow
    being read twice, which those of recomputed layers do not.
    """
    root = output.grad_fn
    assert root is not None
    products, others = _weights(root, inputs)
    kept: list[Kept] = []
    handles = [p.node.register_prehook(partial(p.keep, kept)) for p in products]
    try:
        output.backward(grad, inputs=[*inputs, *others])
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def backward_weight(kept: Sequence[Kept]) -> None:
    """Add the gradients of the weights that backward_input has left out."""
    if kept:
        torch.autograd.backward([k.edge for k in kept], [k.left @ k.right for k in kept])


def _weights(root: Node, inputs: Sequence[Tensor]) -> tuple[list[_Product], list[Tensor]]:
    """(products whose weights can wait, all other leaves) of a graph."""
    wanted = {get_gradient_edge(x).node for x in inputs}
    onward: set[Any] = set()  # nodes on the way to what is wanted
    leaves: dict[Any, frozenset[Any]] = {}  # of nodes that are not
    products: list[_Product] = []
    others: frozenset[Any] = frozenset()
    for node in _children_first(root):
        below = [(k, child, n) for k, (child, n) in enumerate(node.next_functions) if child is not None]
        if node not in wanted and not any(child in onward for _, child, _ in below):
            own = (node,) if hasattr(node, "variable") else ()
            leaves[node] = frozenset(own).union(*(leaves[child] for _, child, _ in below))
            continue
        onward.add(node)
        for k, child, n in below:
            if child in onward:
                continue
            product = _product(node, k, GradientEdge(child, n), leaves[child])
            if product is None:
                others |= leaves[child]
            else:
                products.append(product)
    if root not in onward:
        others = leaves[root]
    # A weight that is also used otherwise does not wait, nor does what is used together with it.
    while mixed := [p for p in products if p.leaves & others]:
        others = others.union(*(p.leaves for p in mixed))
        products = [p for p in products if p not in mixed]
    return products, [leaf.variable for leaf in others]


def _product(node: Any, k: int, edge: GradientEdge, leaves: frozenset[Any]) -> _Product | None:
    """The product whose factor number `k` among the inputs of `node` is made of weights, if it is one."""
    if node.name() not in _PRODUCTS:
        return None
    first, *saved = _PRODUCTS[node.name()]
    if k < first or getattr(node, "_saved_alpha", 1) != 1:
        return None
    second = k > first
    return _Product(node, edge, saved[not second], second, leaves)


def _children_first(root: Node) -> list[Any]:
    """All nodes of a graph, each after those that it passes gradients to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return order
