"""What a config means on a number of ranks, worked out and checked before any process group exists.

check_outline() needs no torch (mm/config/outline.py). An encoder is a torch module: draw_up() imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from llm.config import LLMConfig
from llm.recompute import recompute_parts
from llm.stages import entering_levels, shared_parameters
from mm.config import outline
from mm.config.advice import advise
from mm.config.outline import SINK as SINK  # users of a blueprint find the name here
from mm.config.outline import frozen_modules, schedule_of, weights_gathered
from mm.config.schema import Config, build
from mm.errors import Refused
from parallel.schedule import SchedulePlan
from parallel.schedule.checker.check import check
from parallel.schedule.generators.refuse import check_stages
from parallel.schedule.plan import Params
from parallel.topology.axis import Axes
from parallel.topology.layout import Changes, Layout, Unfit, check_divides
from parallel.topology.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    import encoders
    from mm.plan.step_plan import Edge, EncoderUse, PlanInputs
    from parallel.sequence.stream import Order


@dataclass(frozen=True)
class Blueprint:
    """A checked config. encoders: in the config's order, which is the order of their actions.

    stages: by module, the layers of each of its pp * vpp pipeline stages.
    """

    cfg: Config
    world: int
    llm: LLMConfig
    layouts: Mapping[str, Layout]
    stages: Mapping[str, tuple[Stage, ...]]
    inputs: PlanInputs
    _schedules: dict[tuple[bool, tuple[frozenset[str], ...]], SchedulePlan] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def modules(self) -> list[str]:
        """All modules, encoders first, in one order on every rank."""
        return [*self.inputs.encoders, SINK]

    @property
    def frozen(self) -> set[str]:
        """Modules without a single trainable parameter."""
        return frozen_modules(self.cfg, self.llm)

    @property
    def dtype(self) -> torch.dtype:
        """What modules compute in."""
        return torch_dtype(self.cfg.train.dtype)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of weights and optimizer state: float32 under bfloat16 compute."""
        return torch_dtype("float64" if self.cfg.train.dtype == "float64" else "float32")

    @property
    def shared(self) -> tuple[str, ...]:
        """Parameters of the language model that its first and its last stage both hold."""
        return shared_parameters(self.llm, self.stages[SINK])

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the language model learns beside the next token: balance, z, mtp."""
        llm = self.llm
        weights = {"balance": llm.aux_weight, "z": llm.z_weight, "mtp": llm.mtp_layers * llm.mtp_weight}
        return tuple(name for name, weight in weights.items() if weight)

    @cached_property
    def edges(self) -> Mapping[Edge, tuple[int, ...]]:
        """From encoders to the stages of the language model that their rows enter, in order: which levels
        of the rows enter there. Each level is sent where it is read, and nowhere else."""
        from mm.plan.step_plan import Edge

        return {
            Edge(m, stage): levels
            for m in self.inputs.encoders
            for stage, levels in entering_levels(self.llm, self.stages[SINK], self._levels(m)).items()
        }

    def enters(self, module: str) -> tuple[int, ...]:
        """The stages of the language model that an encoder's rows enter."""
        return tuple(e.stage for e in self.edges if e.source == module)

    def row_shape(self, module: str) -> tuple[int, ...]:
        """Trailing shape of an encoder's rows: [d], or [levels, d]."""
        levels, d = self._levels(module), self.llm.d_model
        return (d,) if levels == 1 else (levels, d)

    def entry_shape(self, edge: Edge) -> tuple[int, ...]:
        """Trailing shape of the rows that travel along an edge: [d], or [levels, d] of those that enter."""
        whole = self.row_shape(edge.source)
        return whole if len(whole) == 1 else (len(self.edges[edge]), *whole[1:])

    def _levels(self, module: str) -> int:
        use = self.inputs.encoders[module]
        return int(use.cls.feature_levels(use.cfg))

    def params(self, module: str) -> Params:
        """When a module's weights are gathered (weights_gathered)."""
        return weights_gathered(self.cfg, module)

    def schedule(self, active: Sequence[Collection[str]], *, train: bool = True) -> SchedulePlan:
        """The schedule of a step whose micro-batches have items of the encoders in `active`.

        Made and checked once for each pattern of active encoders.
        """
        key = (train, tuple(frozenset(a) for a in active))
        if key not in self._schedules:
            layers = {m: stages[-1].stop for m, stages in self.stages.items()}
            enters = {m: self.enters(m) for m in self.inputs.encoders}
            plan = schedule_of(self.cfg, self.layouts, layers, self.frozen, active, enters, train=train)
            check(plan)
            self._schedules[key] = plan
        return self._schedules[key]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name that train.dtype may have."""
    import torch

    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def draw_up(cfg: Config, world: int) -> Blueprint:
    """Check a config against `world` ranks and work out its layouts; raises Refused in words."""
    try:
        return _draw_up(cfg, world)
    except Unfit as error:
        raise Refused(advise(cfg, error, world, lambda changed: _draw_up(changed, world))) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def check_outline(cfg: Config, world: int, say: Callable[[str], object] = lambda why: None) -> None:
    """Check all of a config but its encoders, without torch; raises Refused as draw_up() would.

    say: called with what is wrong before what would work is searched with encoders, which takes seconds.
    """
    try:
        outline.check_outline(cfg, world)
    except Unfit as error:
        check: Callable[[Config, int], object] = outline.check_outline
        if error.module not in (None, SINK):  # what an encoder can do only it knows
            say(error.why)
            check = _draw_up
        raise Refused(advise(cfg, error, world, lambda changed: check(changed, world))) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def _draw_up(cfg: Config, world: int) -> Blueprint:
    from encoders.module import encoder_stages
    from mm.plan.step_plan import PlanInputs

    layouts, llm, llm_stages = outline.outline(cfg, world)
    uses, stages = {}, {}
    for name in cfg.model:
        uses[name] = use = _encoder_use(cfg, name, layouts[name])
        stages[name] = encoder_stages(use.cls, use.cfg, layouts[name].pp)
    _check_levels(uses, llm)
    stages[SINK] = llm_stages
    # Causal attention is even over cp in zigzag order; a scan alone has its neighbours nearer in the other.
    order: Order = "zigzag" if "*" in llm.kinds else "contiguous"
    inputs = PlanInputs(
        layouts[SINK], uses, cfg.data.context, cfg.schedule.microbatches, order, llm.mtp_layers
    )
    blueprint = Blueprint(cfg, world, llm, layouts, stages, inputs)
    blueprint.schedule([set(uses)] * cfg.schedule.microbatches)  # refuses what no schedule can do
    return blueprint


def _encoder_use(cfg: Config, name: str, layout: Layout) -> EncoderUse:
    from encoders.module import check_encoder
    from mm.plan.step_plan import EncoderUse

    enc = cfg.model[name]
    cls = _encoder_class(enc.encoder, name)
    options = build(cls.Config, enc.options, f"model.{name}.options")
    degrees = {d: getattr(layout, d) for d in ("tp", "cp", "pp", "ep", "etp")}
    try:
        check_encoder(cls, options, **degrees)
    except Unfit as error:
        raise Unfit(f"model.{name}: {error.why}", error.works, name) from error
    except ValueError as error:
        raise ValueError(f"model.{name}: {error}") from error
    check_stages(layout, cls.layer_count(options), virtual=False)
    tp = layout.tp if cls.tensor_parallel else 1
    check_divides(f"model.{name}.projector.hidden", enc.projector.hidden, "tp", tp, name)
    return EncoderUse(cls, options, layout, enc.deal)


def _encoder_class(encoder: str, module: str) -> type[encoders.Encoder]:
    import encoders

    try:
        return encoders.resolve(encoder)
    except ValueError as error:
        raise ValueError(f"model.{module}.encoder: {error}") from error


def _check_levels(uses: Mapping[str, EncoderUse], llm: LLMConfig) -> None:
    """Refuse levels of rows that enter nowhere, and layers that no level enters."""
    given, layers = {m: use.cls.feature_levels(use.cfg) - 1 for m, use in uses.items()}, llm.level_layers
    most = max(given.values(), default=0)
    for name, further in given.items():
        if further > len(layers):
            raise Unfit(
                f"model.{name} gives {further + 1} levels of rows, but model.llm.level_layers names "
                f"{len(layers)} layers; needed: one for each level after the first",
                _other_levels(layers, most, len(llm.symbols)),
            )
    if len(layers) > most:
        raise Unfit(
            f"model.llm.level_layers names {len(layers)} layers, but no encoder gives more than {most} "
            "levels of rows after the first, so the rest would have no effect",
            _other_levels(layers, most, len(llm.symbols)),
        )


def _other_levels(layers: Sequence[int], n: int, of: int) -> list[Changes]:
    """So many layers for levels to enter after, these first."""
    more = [*layers, *(k for k in range(of) if k not in layers)]
    return [{"model.llm.level_layers": more[:n]}] if n <= len(more) else []


def bare_module(
    blueprint: Blueprint, name: str, axes: Axes, stage: Stage, device: torch.device | str = "meta"
) -> nn.Module:
    """A stage of module `name` with its global shapes, on the meta device: declarations without memory.
    Raises Refused where an encoder's constructor does, in words, or leaves parameters undeclared."""
    from encoders.module import build_encoder_module
    from llm.model import LLM
    from parallel.sharding.param import seeded

    cfg, stored = blueprint.cfg, blueprint.stored_dtype
    module: nn.Module
    if name == SINK:
        module = LLM(blueprint.llm, axes, stage=stage, device=device, dtype=stored)
        module.recompute = cfg.train.recompute
        module.offload = cfg.train.offload
        module.requires_grad_(not blueprint.llm.freeze)
        return module
    use, enc = blueprint.inputs.encoders[name], cfg.model[name]
    try:
        with seeded(name, cfg.run.seed):  # for what an encoder draws itself
            module = build_encoder_module(
                use.cls,
                use.cfg,
                d_out=blueprint.llm.d_model,
                projector_hidden=enc.projector.hidden,
                axes=axes,
                stage=stage,
                device=device,
                dtype=stored,
            )
    except ValueError as error:
        raise Refused(f"model.{name}: {error}") from error
    module.encoder.recompute = "full" in recompute_parts(cfg.train.recompute)
    module.encoder.timeout_s = cfg.run.timeout_s
    module.freeze(enc.freeze)
    return module


def elements_per_rank(blueprint: Blueprint, name: str) -> int:
    """Weights of module `name` on the rank that holds most of them, by even shares."""
    from parallel.sharding.param import declared

    layout = blueprint.layouts[name]
    data, folded = layout.dp * layout.cp, max(layout.tp, layout.ep, layout.etp) > 1
    held = [0] * layout.pp
    for i, stage in enumerate(blueprint.stages[name]):
        for _, param, spec in declared(bare_module(blueprint, name, Axes(), stage)):
            cut = spec.shard_dim is not None
            if spec.view == "expert" and folded:
                ranks = (
                    layout.edp * (layout.ep if cut else 1) * (layout.etp if spec.etp_dim is not None else 1)
                )
            else:
                ranks = data * (layout.tp if cut and spec.view == "dense" else 1)
            held[i % layout.pp] += -(-param.numel() // ranks)
    return max(held)
