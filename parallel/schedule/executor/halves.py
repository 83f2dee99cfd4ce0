"""A backward in two halves: gradients of what entered a graph first, of its weights later (arXiv 2401.10241).

Autograd can compute some gradients alone, but for the others it would traverse the whole graph a second time.
So the first half keeps two things of every matrix product with weights: the other factor and the gradient of
the result. The second half needs nothing else, and the rest of the graph is freed. Weights that are used in
other operations (norms, convolutions, most autograd functions of our own) get their gradients in the first
half. So do weights of nodes whose names another version of torch has changed.
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
    """The factors of the gradient of a product's weights.

    edges: where the gradient goes. Several edges take consecutive blocks of its rows.
    left, right: its factors, [m, k] and [k, n].
    sizes: rows of each block, where there are several edges.
    ends: for a grouped product, the end of each group among the k columns of left and rows of right.
    turned: the gradient is transposed before it goes to its edges.
    """

    edges: tuple[GradientEdge, ...]
    left: Tensor
    right: Tensor
    sizes: tuple[int, ...] = ()
    ends: Tensor | None = None
    turned: bool = False

    def gradients(self) -> Sequence[Tensor]:
        """The gradients, one for each edge."""
        if self.ends is None:
            made = self.left @ self.right
        else:
            made = F.grouped_mm(self.left, self.right, offs=self.ends)
        made = made.mT if self.turned else made
        return torch.split(made, list(self.sizes)) if self.sizes else (made,)


# Makes Kept from a node, the gradient of its result and the edges to its weights.
_Keep = Callable[[Any, Tensor, tuple[GradientEdge, ...]], Kept]


@dataclass(frozen=True)
class _Product:
    """A product with weights.

    node: its autograd node. edges: to its weights. how: makes Kept. leaves: what its weights are made from.
    """

    node: Any
    edges: tuple[GradientEdge, ...]
    how: _Keep
    leaves: frozenset[Any]

    def keep(self, into: list[Kept], grads: Sequence[Tensor | None]) -> None:
        """Called with the gradient of the product, before its node propagates it."""
        if grads[0] is not None:
            into.append(self.how(self.node, grads[0], self.edges))


def backward_input(output: Tensor, grad: Tensor | None, inputs: Sequence[Tensor]) -> list[Kept]:
    """Add gradients of `output` to the leaves `inputs`; returns what backward_weight needs for the others.

    grad: the gradient of `output`; None for a scalar. The graph is freed. Its saved tensors are read twice,
    which those of recomputed layers do not allow.
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
    """Add the gradients of the weights that backward_input has deferred."""
    if kept:
        gradients = [grad for k in kept for grad in k.gradients()]
        torch.autograd.backward([edge for k in kept for edge in k.edges], gradients)


def _weights(root: Node, inputs: Sequence[Tensor]) -> tuple[list[_Product], list[Tensor]]:
    """(products whose weight gradients can be deferred, all other leaves) of a graph."""
    wanted = {get_gradient_edge(x).node for x in inputs}
    onward: set[Any] = set()  # nodes on a path to the wanted inputs
    leaves: dict[Any, frozenset[Any]] = {}  # by node on no such path
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
    # A weight that is also used in another operation is not deferred, nor is any weight of the same product.
    while mixed := [p for p in products if p.leaves & others]:
        others = others.union(*(p.leaves for p in mixed))
        products = [p for p in products if p not in mixed]
    return products, [leaf.variable for leaf in others]


def _waiting(node: Any, aside: Collection[int]) -> tuple[_Keep | None, tuple[int, ...]]:
    """(how to keep `node`, which of its inputs are the deferred weights); (None, ()) for other nodes.

    aside: the inputs that are computed from weights alone.
    """
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


# Matrix products a @ b, by the name of their autograd node: the index of a among its inputs (b is the next),
# and the attributes in which the node keeps a and b.
_MATRICES = {
    "MmBackward0": (0, "_saved_self", "_saved_mat2"),
    "AddmmBackward0": (1, "_saved_mat1", "_saved_mat2"),
}


def _keep_matrices(
    other: str, second: bool, node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]
) -> Kept:
    """second: whether the weight is the second factor. other: the attribute that holds the other factor."""
    factor = getattr(node, other)
    return Kept(edges, factor.mT, grad) if second else Kept(edges, grad, factor.mT)


# The attributes that the node of a grouped product of rows [m, k] and weights [E, k, n] must have.
_GROUPED = ("_saved_self", "_saved_offs", "_saved_mat2_sym_strides")


def _keep_grouped(node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]) -> Kept:
    rows, ends = node._saved_self, node._saved_offs
    # The gradient of weights that are used transposed gets their memory layout.
    if node._saved_mat2_sym_strides[-1] != 1:
        return Kept(edges, grad.mT, rows, ends=ends, turned=True)
    return Kept(edges, rows.mT, grad, ends=ends)


def _keep_joined(node: Any, grad: Tensor, edges: tuple[GradientEdge, ...]) -> Kept:
    left, right, sizes = joined.weights_factors(node, grad)
    return Kept(edges, left, right, sizes)


def _children_first(root: Node) -> list[Any]:
    """All nodes of a graph, each after the nodes to which it passes gradients."""
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
