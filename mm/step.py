"""One training or evaluation step: the handlers of a schedule's actions on this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from encoders.module import RowsMismatch
from mm.batch import RankMicrobatch
from mm.errors import DataError
from mm.feed import Prepared
from mm.job import DTYPES, SINK, Job
from parallel.schedule import Action, Kind, colocated, execute


@dataclass
class StepResult:
    """This rank's share of a step.

    loss: sum of its supervised tokens' losses divided by the step's global count; only tp rank 0 of the
    language model counts it, so that summing over ranks gives the loss. seconds: host time by (kind, module).
    """

    loss: float = 0.0
    seconds: dict[tuple[Kind, str], float] = field(default_factory=dict)


OnTokens = Callable[[RankMicrobatch, Tensor], None]


def run_step(job: Job, prepared: Prepared, *, train: bool, on_tokens: OnTokens | None = None) -> StepResult:
    """Run every micro-batch of a prepared step; gradients are left in the modules' parameters.

    on_tokens: called with each micro-batch and its per-token losses [T] (evaluation). Does not update.
    """
    blueprint = job.blueprint
    actions = colocated(
        prepared.plan.active,
        sources=list(blueprint.inputs.encoders),
        sink=SINK,
        frozen=blueprint.frozen,
        train=train,
    )
    run = _Run(job, prepared.micro, prepared.plan.supervised, train, on_tokens)
    job.boundary.stats.reset()
    with torch.set_grad_enabled(train):
        seconds = execute(actions, run.handlers)
    return StepResult(float(run.loss), seconds)


class _Run:
    """Tensors in flight between the actions of one step."""

    def __init__(
        self,
        job: Job,
        micro: Sequence[RankMicrobatch],
        supervised: int,
        train: bool,
        on_tokens: OnTokens | None,
    ) -> None:
        self.job, self.micro, self.supervised = job, micro, supervised
        self.train, self.on_tokens = train, on_tokens
        self.outputs: dict[tuple[str, int], Tensor] = {}  # encoder features, attached to their graph
        self.entries: dict[tuple[str, int], Tensor] = {}  # rows as the language model reads them, leaves
        self.returned: dict[tuple[str, int], Tensor] = {}  # gradients brought back to the encoder's layout
        self.losses: dict[int, Tensor] = {}
        self.counts = SINK in job.modules and job.blueprint.layouts[SINK].coord(job.rank.rank).tp == 0
        # What a rank that hosts no source of an edge holds of it: no rows, of the right width and dtype.
        dtype = DTYPES[job.blueprint.cfg.train.dtype]
        self.nothing = torch.empty(0, job.blueprint.llm.d_model, dtype=dtype, device=job.rank.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=job.rank.device)
        self.handlers = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BOUNDARY_FORWARD: self.boundary_forward,
            Kind.BOUNDARY_BACKWARD: self.boundary_backward,
        }

    def forward(self, action: Action) -> None:
        if action.module not in self.job.modules:
            return
        if action.module == SINK:
            self._forward_sink(action.microbatch)
        else:
            self._forward_source(action)

    def _forward_source(self, action: Action) -> None:
        key, mb = (action.module, action.microbatch), self.micro[action.microbatch]
        try:
            features = self.job.modules[action.module](mb.items[action.module])
        except RowsMismatch as error:
            sample = mb.names[action.module][error.item]
            raise DataError(f"module {action.module}, sample {sample}: {error.why}") from error
        self.outputs[key] = features.values

    def _forward_sink(self, i: int) -> None:
        mb = self.micro[i]
        assert mb.llm is not None
        rows = {m: self.entries[m, i] for m in mb.llm.places}
        token_loss = self.job.modules[SINK](mb.llm, rows)
        if self.on_tokens is not None:
            self.on_tokens(mb, token_loss)
        loss = token_loss.sum() / self.supervised
        if self.train:
            self.losses[i] = loss
        if self.counts:
            self.loss += loss.detach()

    def boundary_forward(self, action: Action) -> None:
        key, mb = (action.module, action.microbatch), self.micro[action.microbatch]
        if not self._on_edge(action.module):
            return
        held = self.outputs[key].detach() if key in self.outputs else self.nothing
        rows = self.job.boundary.forward(mb.edges[action.module], held)
        learns = self.train and action.module not in self.job.blueprint.frozen
        self.entries[key] = rows.detach().requires_grad_(learns)

    def backward(self, action: Action) -> None:
        module = self.job.modules.get(action.module)
        if module is None:
            return
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(action.last)
        module.set_is_last_backward(action.last)
        if action.module == SINK:
            self.losses.pop(action.microbatch).backward()
        else:
            key = (action.module, action.microbatch)
            self.outputs.pop(key).backward(self.returned.pop(key))

    def boundary_backward(self, action: Action) -> None:
        key, mb = (action.module, action.microbatch), self.micro[action.microbatch]
        if not self._on_edge(action.module):
            return
        grad = self.entries.pop(key).grad
        plan = mb.edges[action.module]
        self.returned[key] = self.job.boundary.backward(plan, self.nothing if grad is None else grad)

    def _on_edge(self, source: str) -> bool:
        """Whether this rank hosts either end of the edge from `source`."""
        return source in self.job.modules or SINK in self.job.modules
