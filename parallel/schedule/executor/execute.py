"""The executor: carries out a list of actions and times each kind of work.

A handler is called with an action, on the ranks whose list has that action.

- It may return the time.perf_counter() at which its inputs were there, so that records separate waiting from
  work.
- It may keep tensors between actions in tables keyed by (module, stage, micro-batch).
- An action with span > 1 covers several micro-batches.
- No handler of a send, a receive, a boundary, GATHER or GRAD_SYNC waits. If one did, ranks at different
  depths would block each other.
- Each direction of a pipeline or an edge has a process group of its own, because transfers of opposite
  directions are not ordered among each other. A backend that matches messages by tag can use one group.
- A paired FORWARD and the BACKWARD after it (Action.paired) are handled together, each as it is alone. Both
  handlers wait for their inputs, and may let the other one run where they exchange rows of experts.
- After the last action, the caller waits for all sends and transfers that are still under way.

What a handler must do, by kind
-------------------------------
FORWARD
    Wait for the inputs: the hidden states of RECV_FORWARD (stage > 0), and in the sink the rows of each
    active source that enter at this stage (BOUNDARY_FORWARD). Make them leaves that require grad. Run the
    stage and keep its output attached to the graph. The sink's last stage computes the loss.
BACKWARD
    Wait for the gradient of the output. It comes from RECV_BACKWARD; on the last stage of a source from
    BOUNDARY_BACKWARD; on the last stage of the sink from the loss. Run the backward, then free the output.
    `last` marks the stage's last backward of the step, in which FSDP starts to sum the gradients.
BACKWARD_INPUT
    As BACKWARD, but only for the gradients of the stage's inputs. Keep what the weight gradients need
    (parallel.schedule.executor.halves).
BACKWARD_WEIGHT
    Compute the weight gradients from what was kept, then free it. This half carries `last`.
SEND_FORWARD
    Start to send the stage's output to stage `peer` (isend with `tag`) and return. The tensor must live until
    the send is complete. checker.graph.releases() lists the computation before which to wait for that.
RECV_FORWARD
    Start to receive the stage's input from stage `peer` (irecv with `tag`) and return. Its shape follows from
    the step plan.
SEND_BACKWARD, RECV_BACKWARD
    The same for gradients: send that of the stage's input to the stage before; receive that of the stage's
    output from the stage after.
BOUNDARY_FORWARD
    Start the edge's transfer (BoundaryCommunicator.start_forward) and return. A rank passes the rows that it
    has made, none if it makes none, and receives the rows that it reads. FORWARD of the sink waits for them.
BOUNDARY_BACKWARD
    The same for gradients (start_backward). BACKWARD of the source's last stage waits for them.
GATHER
    Start to gather the stage's parameters on all of its data ranks and return. The stage's first computation
    waits for them.
FREE
    Release that memory.
GRAD_SYNC
    Start to sum the stage's gradients over its data ranks and return.
OPTIMIZER
    Wait for all sums, also for those in last backwards. Compute the gradient norm, clip and update. Where the
    plan leaves it out, the caller waits for the sums after the last action.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from parallel.schedule.action import Action, Kind
from parallel.schedule.record import Record

Handler = Callable[[Action], float | None]
Observe = Callable[[Record], object]
Half = Callable[[], float | None]  # a handler with its action
# Runs both; of each what it returned, its start and its end, and for how many seconds it had the turn.
Together = Callable[[Half, Half], Sequence[tuple[float | None, float, float, float]]]


def execute(
    actions: Sequence[Action],
    handlers: Mapping[Kind, Handler],
    *,
    observe: Observe | None = None,
    starting: Callable[[Action], object] | None = None,
    together: Together | None = None,
) -> dict[tuple[Kind, str], float]:
    """Run `actions` in order; returns the seconds spent, by (kind, module).

    observe: called with the Record of each action after it, for example `records.append`. A meter that it
        reads (processor time, memory) has then advanced by exactly this action since the call before. Those
        of a pair follow both: it has advanced by both at the first.
    starting: called with each action before it; of a pair with its BACKWARD before both.
    together: runs the two computations of a pair (parallel.comm.turns); None: one after the other.

    Times are host times. On an accelerator they measure issue, not execution, of asynchronous work.
    """
    seconds: dict[tuple[Kind, str], float] = defaultdict(float)
    clock, queue = time.perf_counter, iter(actions)
    for action in queue:
        if action.paired and together is not None:
            both = (action, next(queue))
            if starting is not None:
                starting(both[1])
            ran = together(*(partial(handlers[a.kind], a) for a in both))
            for a, (_, _, _, spent) in zip(both, ran, strict=True):
                seconds[a.kind, a.module] += spent
            if observe is not None:
                for a, (ready, start, end, _) in zip(both, ran, strict=True):
                    observe(Record(a, start, end, start if ready is None else ready))
            continue
        if starting is not None:
            starting(action)
        start = clock()
        ready = handlers[action.kind](action)
        end = clock()
        seconds[action.kind, action.module] += end - start
        if observe is not None:
            observe(Record(action, start, end, start if ready is None else ready))
    return dict(seconds)
