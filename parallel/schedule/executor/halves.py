"""A backward in two halves: gradients of what entered a graph first, of its weights later (arXiv 2401.10241).

Autograd can be asked for some gradients alone, but asked for the rest later it goes through the whole graph a
second time. So the first half keeps, of every matrix product with weights, the other factor and the gradient
of the result, which is all that the second half needs, and gives back the rest of the graph. Weights that are
used otherwise (norms, convolutions, in most autograd functions of our own) get their gradients in the first
half, and so do those of nodes that another version of torch names otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from parallel.tensor_parallel import joined


@dataclass(frozen=True)
class Kept:
    """What the gradient of a product's weights is made of.

    edges: where it goes, one below another by `sizes` rows where there are several; left, right: its factors;
    ends: of a grouped product, the last row of each group (in columns of left and rows of right); turned: it
    goes there transposed.
    """

    edges: tuple[GradientEdge, ...]
    left: Tensor
    right: Tensor
    sizes: tuple[int, ...] = ()
    ends: Tensor | None = None
    turned: bool = False

    def gradients(self) -> Sequence[Tensor]:
        """One for each edge."""
        if self.ends is None:
            made = self.left @ self.right
        else:
            made = F.grouped_mm(self.left, self.right, offs=self.ends)
        made = made.mT if self.turned else made
        return torch.split(made, list(self.sizes)) if self.sizes else (made,)


# What to keep of a node, of the gradient of its result and of the edges to its weights.
_Keep = Callable[[Any, Tensor, tuple[GradientEdge, ...]], Kept]


@dataclass(frozen=True)
class _Product:
    """A product with weights. edges: to them; leaves: that they are made of."""

    node: Any
    edges: tuple[GradientEdge, ...]
    how: _Keep
    leaves: frozenset[Any]

    def keep(self, into: list[Kept], grads: Sequence[Tensor | None]) -> None:
        """Called with the gradient of the product, before its node passes it on."""
        if grads[0] is not None:
            into.append(self.how(self.node, grads[0], self.edges))


def backward_input(output: Tensor, grad: Tensor | None, inputs: Sequence[Tensor]) -> list[Kept]:
    """Add gradients of `output` to the leaves `inputs`; returns what backward_weight needs for the others.

    grad: of `output`; None for a scalar's own. The graph can be used no more. Its saved tensors must allow
    being read twice, which those of recomputed layers do not.
    """
    root = output.grad_fn
    assert root is not None
    products, others = _weights(root, inputs)
    kept: list[Kept] = []
    for p in products:
        if p.node.name() == joined.NODE:
            joined.let_weights_wait(p.node)
    handles = [p.node.register_prehook(partial(p.keep, kept)) for p in products]
    try:
        torch.autograd.backward(output, grad, inputs=[*inputs, *others])
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def backward_weight(kept: Sequence[Kept]) -> None:
    """Add the gradients of the weights that backward_input has left out."""
    if kept:
        gradients = [grad for k in kept for grad in k.gradients()]
        torch.autograd.backward([edge for k in kept for edge in k.edges], gradients)


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
        aside = {k: (GradientEdge(child, n), leaves[child]) for k, child, n in below if child not in onward}
        how, of_weights = _waiting(node, aside.keys())
        if how is not None:
            edges = tuple(aside[k][0] for k in of_weights)
            products.append(_Product(node, edges, how, frozenset().union(*(aside[k][1] for k in of_weights))))
        others = others.union(
            *(found for k, (_, found) in aside.items() if how is None or k not in of_weights)
        )
    if root not in onward:
        others = leaves[root]
    # A weight that is also used otherwise does not wait, nor does what is used together with it.
    while mixed := [p for p in products if p.leaves & others]:
        others = others.union(*(p.leaves for p in mixed))
        products = [p for p in products if p not in mixed]
    return products, [leaf.variable for leaf in others]


def _waiting(node: Any, aside: Collection[int]) -> tuple[_Keep | None, tuple[int, ...]]:
    """(what to keep of `node`, which of its inputs are the weights whose gradients can wait), if it is a
    product that is known here. aside: the inputs that are made of weights alone."""
    name = node.name()
    if name in _MATRICES and getattr(node, "_saved_alpha", 1) == 1:
        first, *names = _MATRICES[name]
        for second in (False, True):
            if first + second in aside:
                return partial(_keep_matrices, names[not second], second), (first + second,)
    if name == "GroupedMmBackward0" and 1 in aside and all(hasattr(node, n) for n in _GROUPED):
        return _keep_grouped, (1,)
    if name == joined.NODE:
        weights = tuple(range(1, 1 + node.weights))
        if all(k in aside for k in weights):
            return _keep_joined, weights
    return None, ()


# Products of matrices a @ b by their autograd nodes: where a is among the inputs, b being the next, and under
# what names the node keeps the two.
_MATRICES = {
    "MmBackward0": (0, "_saved_self", "_saved_mat2"),
    "AddmmBackward0": (1, "_saved_mat1", "_saved_mat2"),
}


def _keep_matrices(
    other: str, second: bool, node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]
) -> Kept:
    """second: the weight is the second factor; other: the name under which the node keeps the first."""
    factor = getattr(node, other)
    return Kept(edges, factor.mT, grad) if second else Kept(edges, grad, factor.mT)


# What a grouped product of rows [m, k] and weights [E, k, n] must have kept.
_GROUPED = ("_saved_self", "_saved_offs", "_saved_mat2_sym_strides")


def _keep_grouped(node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]) -> Kept:
    rows, ends = node._saved_self, node._saved_offs
    # Weights that are used transposed get their gradient as they lie in memory.
    if node._saved_mat2_sym_strides[-1] != 1:
        return Kept(edges, grad.mT, rows, ends=ends, turned=True)
    return Kept(edges, rows.mT, grad, ends=ends)


def _keep_joined(node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]) -> Kept:
    left, right, sizes = joined.weights_factors(node, grad)
    return Kept(edges, left, right, sizes)


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
