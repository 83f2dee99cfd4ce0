"""The executor: carries out a list of actions and times each kind of work.

What a handler must do, by kind
-------------------------------
A handler is called with its action, on the ranks whose list has it. It may return the time.perf_counter() at
which it had what it waited for, so that records tell waiting from work. It may keep tensors in tables
keyed by (module, stage, micro-batch). An action with span > 1 covers several micro-batches.

FORWARD          Wait for the inputs: for stage > 0 what RECV_FORWARD put under way, for stage 0 of the sink
                 the rows of each active source from BOUNDARY_FORWARD. Make them leaves that require grad.
                 Run the stage; keep its output attached. The last stage of the sink makes the loss.
BACKWARD         Wait for the output's gradient: from RECV_BACKWARD, on the last stage of a source from
                 BOUNDARY_BACKWARD, on the last stage of the sink from the loss. Free the output after.
                 `last`: the stage's last backward of the step (FSDP reduces gradients in it).
BACKWARD_INPUT   The same for gradients of the stage's inputs; what those of weights still need is kept
                 (parallel.schedule.executor.halves).
BACKWARD_WEIGHT  The gradients of the weights, from what was kept; free it. Carries `last`.
SEND_FORWARD     Start sending the stage's output to stage `peer` (isend, `tag`) and return. The tensor must
                 live until the send is complete: graph.let_go() says before which computation to wait for
                 that and give it back, without blocking the other end for good.
RECV_FORWARD     Start receiving the input from stage `peer` (irecv, `tag`) and return. Shapes follow from the
                 step plan.
SEND_BACKWARD    The same with the gradient of the stage's input, to the stage before.
RECV_BACKWARD    The same with the gradient of its output, from the stage after.
BOUNDARY_FORWARD Start the edge's transfer (BoundaryCommunicator.start_forward) and return; never wait here,
                 or ranks that run at different depths block each other. A rank at both ends passes its rows
                 and gets its share; one that holds no rows passes none. FORWARD of the sink waits.
BOUNDARY_BACKWARD  The same with gradients (start_backward); BACKWARD of the source's last stage waits.
GATHER, FREE     Make the stage's parameters whole on every rank of its dp axis; give the memory back.
GRAD_SYNC        Sum the stage's gradients over dp.
OPTIMIZER        Norm, clip, update.

Transfers of opposite directions are ordered each for itself, so they need groups of their own ("..forward",
"..backward"); on a backend that matches messages by tag one group can serve both. After the last action wait
for the sends and transfers still under way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from parallel.schedule.action import Action, Kind
from parallel.schedule.record import Record

Handler = Callable[[Action], float | None]
Observe = Callable[[Record], object]


def execute(
    actions: Sequence[Action], handlers: Mapping[Kind, Handler], *, observe: Observe | None = None
) -> dict[tuple[Kind, str], float]:
    """Run `actions` in order; returns the seconds spent by (kind, module).

    observe: called after each action with its Record: `records.append` keeps what a drawing or a trace shows,
    and what a caller reads there (processor time, memory) is that of the action since the call before. The
    times are host times. On an accelerator they measure issue, not execution, of asynchronous work.
    """
    seconds: dict[tuple[Kind, str], float] = defaultdict(float)
    clock = time.perf_counter
    for action in actions:
        start = clock()
        ready = handlers[action.kind](action)
        end = clock()
        seconds[action.kind, action.module] += end - start
        if observe is not None:
            observe(Record(action, start, end, start if ready is None else ready))
    return dict(seconds)
