"""Faults in `parallel.boundary`."""

from __future__ import annotations

from tests.mutations.fault import Fault

STACK = "tests/parallel/boundary/test_stack.py"
COMMUNICATOR = (
    "tests/parallel/boundary/test_communicator.py::test_random_boundaries_are_exact_with_least_bytes"
)
PLANS = "tests/parallel/boundary/test_plan.py::test_random_boundaries"

BOUNDARY = (
    Fault(
        "boundary.second-hop",
        "a second hop is taken whatever it spares",
        "parallel/boundary/nodes.py",
        "(spared > 0) & (spared >= spares * readers)",
        "spared > 0",
        "tests/parallel/boundary/test_plan.py::test_a_second_hop_is_taken_where_it_spares_enough",
    ),
    Fault(
        "boundary.source-stage",
        "rows are said to be on the encoder's first stage",
        "parallel/boundary/sides.py",
        "_lanes(layout, [layout.pp - 1])",
        "_lanes(layout, [0])",
        "tests/parallel/boundary/test_sides.py::test_the_source_holds_its_items_end_to_end",
    ),
    Fault(
        "boundary.send-again",
        "rows are sent to ranks that have them",
        "parallel/boundary/routes.py",
        "requested = _without_own(have, requests.reader, requested)",
        "requested = requested",
        PLANS,
    ),
    Fault(
        "boundary.consumers",
        "of several consumers' gradients one is taken",
        "parallel/boundary/plan.py",
        "partial=True) for layer in layers_of(dest)",
        "partial=True) for layer in layers_of(dest)[:1]",
        PLANS,
    ),
    Fault(
        "boundary.copies",
        "a row that is read three times is copied once",
        "parallel/boundary/communicator.py",
        "for _, of, to in repeats.rounds:",
        "for _, of, to in repeats.rounds[:1]:",
        COMMUNICATOR,
    ),
    Fault(
        "boundary.sum-of-copies",
        "gradients of a row that is read three times are added once",
        "parallel/boundary/communicator.py",
        "for which, _, to in repeats.rounds:",
        "for which, _, to in repeats.rounds[:1]:",
        COMMUNICATOR,
    ),
    Fault(
        "boundary.nodes-mixed",
        "rows with several readers enter nodes once where their micro-batch takes no second hop",
        "parallel/boundary/nodes.py",
        "if self.once is not self.runs and not spread.all():",
        "if self.once is not self.runs and not spread.any():",
        "tests/parallel/boundary/test_stack.py::test_so_they_are_where_items_are_read_several_times",
    ),
    Fault(
        "still.elsewhere",
        "a plan holds that no row moves where any item is computed by its reader",
        "parallel/boundary/stack.py",
        "| (c.rows == 0)).all()",
        "| (c.rows == 0)).any()",
        "tests/parallel/boundary/test_still.py",
    ),
    Fault(
        "still.order",
        "rows that stay are read in the order of items, not of tokens",
        "parallel/boundary/still.py",
        "dest[turn] = before(rows[turn])",
        "dest[:] = before(rows)",
        "tests/parallel/boundary/test_still.py",
    ),
    Fault(
        "stack.layers",
        "a micro-batch has as many backward transfers as another",
        "parallel/boundary/stack.py",
        "np.maximum.at(layers, batch, pieces.copies)",
        "np.maximum.at(layers, batch, pieces.copies.max())",
        "tests/parallel/boundary/test_stack.py::test_so_they_are_where_items_are_read_several_times",
    ),
    Fault(
        "plan.same-content",
        "items of unlike payloads and equal sizes count as one",
        "mm/plan/table.py",
        "{part.sha256 or nth} {sorted",
        "{len(part.sha256) or nth} {sorted",
        "tests/mm/plan/test_step_plan.py::test_an_item_that_a_stream_has_several_times_is_computed_once",
    ),
    Fault(
        "boundary.joint",
        "micro-batches that are computed at once are split as if each began the stream",
        "parallel/boundary/sides.py",
        "np.clip(begin - joint.before[:, None, None], 0",
        "np.clip(begin, 0",
        "tests/parallel/boundary/test_sides.py"
        "::test_micro_batches_that_are_computed_at_once_are_split_together",
    ),
    Fault(
        "stack.readers",
        "a rank plans without the other readers of the lanes that serve it",
        "parallel/boundary/stack.py",
        "forward = own_held | with_streams(own_read, held, helds)",
        "forward = own_held | own_read",
        STACK,
    ),
    Fault(
        "stack.nodes",
        "a rank plans without the rest of what a reader wants on its node",
        "parallel/boundary/stack.py",
        "forward = with_streams(forward, read, reads)",
        "forward = forward.copy()",
        STACK,
    ),
    Fault(
        "stack.moves",
        "micro-batches in which only some ranks move rows are said not to",
        "parallel/boundary/stack.py",
        "moving[k] |= found[0]",
        "moving[k] &= found[0]",
        STACK,
    ),
    Fault(
        "stack.second-hop",
        "all micro-batches take second hops where lanes have two ranks on a node",
        "parallel/boundary/stack.py",
        "every = (size - 1 >= spares * size).all() and",
        "every = (size > 0).all() and",
        STACK,
    ),
    Fault(
        "stack.spares",
        "the planner does not know how much second hops must spare",
        "parallel/boundary/cache.py",
        "partial(plan_stack, rank=rank, node_size=node_size, spares=spares)",
        "partial(plan_stack, rank=rank, node_size=node_size, spares=0.0)",
        STACK,
    ),
    Fault(
        "boundary.node-twice",
        "a row crosses to a node for each lane there that wants it",
        "parallel/boundary/nodes.py",
        "_Lacking(cells, runs, each_row_once(runs), size)",
        "_Lacking(cells, runs, runs, size)",
        PLANS,
    ),
)
