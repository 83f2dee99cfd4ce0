"""A blueprint: what a config means on a number of ranks, checked before any process group exists.

check_outline() checks all but the encoders, without torch (mm/config/outline.py). draw_up() imports the
encoders, which are torch modules, checks them too and returns the blueprint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llm.config import LLMConfig
from llm.flops import document_cost
from llm.stages import entering_levels, shared_parameters
from mm.config import outline
from mm.config.advice import advise
from mm.config.build import build
from mm.config.data import storage_of
from mm.config.nodes import node_size
from mm.config.outline import SINK, frozen_modules, given_policy, with_policy
from mm.config.schema import Config
from mm.config.training import recomputed
from mm.data.storage import Storage
from mm.errors import Refused
from mm.plan.known import Known
from mm.plan.levels import check_levels
from mm.plan.projectors import check_projector, projector_kind, resampling
from mm.plan.schedules import Schedules
from parallel.schedule import ModuleUse, SchedulePlan
from parallel.schedule.generators.refuse import check_stages
from parallel.topology.axis import Axes
from parallel.topology.data_parallel import Policy, Shards, shards_of
from parallel.topology.groups import GroupPlan, group_plan
from parallel.topology.layout import Layout, Unfit
from parallel.topology.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    import encoders
    from mm.plan.inputs import EncoderUse, PlanInputs
    from mm.plan.step_plan import Edge
    from mm.plan.weights import Unit, Weight
    from parallel.sequence.stream import Order


@dataclass(frozen=True)
class Blueprint:
    """A checked config on `world` ranks."""

    cfg: Config
    world: int  # ranks of the job
    llm: LLMConfig
    layouts: Mapping[str, Layout]  # by module
    stages: Mapping[str, tuple[Stage, ...]]  # by module, the layers of each of its pp * vpp pipeline stages
    inputs: PlanInputs  # its encoders are in the config's order, which is the order of their actions
    known: Known = field(default_factory=Known, compare=False, repr=False)  # what other blueprints share

    @cached_property
    def storage(self) -> Storage:
        """What reads the shards of the config's data."""
        return storage_of(self.cfg.data)

    @property
    def modules(self) -> list[str]:
        """All modules in the same order on every rank, encoders first."""
        return [*self.inputs.encoders, SINK]

    @property
    def frozen(self) -> set[str]:
        """Modules without any trainable parameter."""
        return frozen_modules(self.cfg, self.llm)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that modules compute in."""
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
        """The language model's further losses that have a weight: balance, z, mtp."""
        llm = self.llm
        weights = {"balance": llm.aux_weight, "z": llm.z_weight, "mtp": llm.mtp_layers * llm.mtp_weight}
        return tuple(name for name, weight in weights.items() if weight)

    @cached_property
    def edges(self) -> Mapping[Edge, tuple[int, ...]]:
        """By edge, in order: the levels of the encoder's rows that enter that stage, and no other."""
        from mm.plan.step_plan import Edge

        return {
            Edge(m, stage): levels
            for m in self.inputs.encoders
            for stage, levels in entering_levels(self.llm, self.stages[SINK], self._levels(m)).items()
        }

    @cached_property
    def groups(self) -> GroupPlan:
        """The process groups of the job. Encoders have no experts."""
        return group_plan(
            {m: self.layouts[m] for m in self.modules},
            world=self.world,
            edges=[(edge.source, edge.stage) for edge in self.edges],
            sink=SINK,
            tied=(SINK,) if self.shared else (),
            experts=(SINK,) if "E" in self.llm.kinds else (),
            shards={m: self.shards(m) for m in self.modules},
        )

    def enters(self, module: str) -> tuple[int, ...]:
        """The stages of the language model that an encoder's rows enter."""
        return tuple(e.stage for e in self.edges if e.source == module)

    def row_shape(self, module: str) -> tuple[int, ...]:
        """Trailing shape of an encoder's rows: [d], or [levels, d]."""
        levels, d = self._levels(module), self.llm.d_model
        return (d,) if levels == 1 else (levels, d)

    def entry_shape(self, edge: Edge) -> tuple[int, ...]:
        """Trailing shape of the rows sent along an edge: [d], or [levels, d] of the levels that enter."""
        whole = self.row_shape(edge.source)
        return whole if len(whole) == 1 else (len(self.edges[edge]), *whole[1:])

    def _levels(self, module: str) -> int:
        use = self.inputs.encoders[module]
        return int(use.cls.feature_levels(use.cfg))

    @property
    def node_size(self) -> int | None:
        """Ranks a node, by the config or as torchrun starts them; None where one node has all of them."""
        return node_size(self.cfg, self.world)

    def shards(self, module: str) -> Shards:
        """Into how many shards a module's weights are split; raises Unfit where nodes do not allow it."""
        return shards_of(self.layouts[module], self.policies[module], self.node_size)

    @cached_property
    def policies(self) -> Mapping[str, Policy]:
        """By module, its data-parallel policy: the config's, or the default.

        That is zero3 where a step has one micro-batch, whose weights have to be gathered anyway, else as the
        module's size has it.
        """
        return {m: given_policy(self.cfg, x) or self._default(m) for m, x in self.layouts.items()}

    def _default(self, module: str) -> Policy:
        from mm.plan.weights import MOST_HELD_ENCODER, MOST_HELD_LLM, default_policy

        if self.cfg.schedule.microbatches == 1:
            return "zero3"
        stages = [self.weights(module, s) for s in range(len(self.stages[module]))]
        most = MOST_HELD_LLM if module == SINK else MOST_HELD_ENCODER
        return default_policy(stages, self.layouts[module].pp, self.stored_dtype.itemsize, most)

    def weights(self, module: str, stage: int) -> list[list[Weight]]:
        """The weights of a stage, by what FSDP gathers at once; found once."""
        from mm.plan.recipe import update_rule
        from mm.plan.weights import Items, stage_weights

        train, found = self.cfg.train, self.stages[module][stage]

        def make() -> list[list[Weight]]:
            made = self.known.get(("bare", module, found), lambda: bare_module(self, module, Axes(), found))
            sizes = self.dtype.itemsize, self.stored_dtype.itemsize
            items = Items(*sizes, update_rule(train), averaged=train.average is not None)
            return stage_weights(made, self.layouts[module], items, by_layer=train.shard == "layer")

        return self.known.get(("weights", self._part(module, stage)), make)

    def units(self, module: str, stage: int) -> list[Unit]:
        """The same as a rank holds them under the module's policy."""
        from mm.plan.weights import units_of

        x, shards = self.layouts[module], self.shards(module)
        key = "units", self._part(module, stage), x.dp * x.cp, x.edp, shards
        return self.known.get(key, lambda: units_of(self.weights(module, stage), x, shards))

    def _part(self, module: str, stage: int) -> Hashable:
        x = self.layouts[module]  # all that a rank's part of the weights of a stage follows from
        return module, self.stages[module][stage], x.tp, x.ep, x.etp

    @cached_property
    def uses(self) -> Mapping[str, ModuleUse]:
        """The modules as schedules need them."""
        out = {}
        for m in self.modules:
            use = ModuleUse(
                self.layouts[m],
                m in self.frozen,
                experts=m == SINK and "E" in self.llm.kinds,
                layers=self.stages[m][-1].stop,
                enters=(0,) if m == SINK else self.enters(m),
            )
            out[m] = with_policy(use, self.policies[m], self.node_size)
        return out

    def schedule(self, active: Sequence[Collection[str]], *, train: bool = True) -> SchedulePlan:
        """The schedule of a step. active: by micro-batch, the encoders that have items in it.

        It is made and checked once for each pattern of active encoders. Raises ValueError (Unfit) where no
        schedule fits.
        """
        return self.schedules.get(active, train=train)

    @cached_property
    def schedules(self) -> Schedules:
        """The schedules that have been made."""
        return Schedules(lambda active, train: self.known.schedule(self.cfg, self.uses, active, train=train))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a value of train.dtype names."""
    import torch

    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def draw_up(cfg: Config, world: int, known: Known | None = None) -> Blueprint:
    """Check a config on `world` ranks, encoders included, and return its blueprint.

    known: of one that differs in layout, schedule and recomputation alone. Raises Refused, with advice.
    """
    try:
        return _unadvised(cfg, world, known)
    except Unfit as error:
        raise Refused(advise(cfg, error, world, lambda changed: _unadvised(changed, world))) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def check_outline(cfg: Config, world: int, report: Callable[[str], object] = lambda why: None) -> None:
    """Check all of a config except its encoders, without torch; raises Refused as draw_up() would.

    report: called with the fault before a search that needs the encoders, and so takes seconds.
    """
    try:
        outline.check_outline(cfg, world)
    except Unfit as error:
        check: Callable[[Config, int], object] = outline.check_outline
        if error.module not in (None, SINK):  # only the encoder knows which degrees it supports
            report(error.why)
            check = _unadvised
        raise Refused(advise(cfg, error, world, lambda changed: check(changed, world))) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def _unadvised(cfg: Config, world: int, known: Known | None = None) -> Blueprint:
    """The blueprint of a config; raises Unfit, ValueError or Refused without advice."""
    from encoders.media.limits import Limits
    from encoders.module import encoder_stages
    from mm.plan.inputs import PlanInputs

    layouts, llm, llm_stages = outline.outline(cfg, world)
    uses = {name: _encoder_use(cfg, name, layouts[name], llm.d_model) for name in cfg.model}
    stages = {m: encoder_stages(use.cls, use.cfg, layouts[m].pp * layouts[m].vpp) for m, use in uses.items()}
    stages[SINK] = llm_stages
    check_levels(uses, llm)
    for m, use in uses.items():
        width = use.cls.feature_width(use.cfg)
        if cfg.model[m].projector.kind == "none" and width != llm.d_model:
            raise ValueError(
                f"model.{m}.projector.kind=none, but features are {width} wide and the language model "
                f"{llm.d_model}; needed: linear or mlp"
            )
    # Zigzag order balances causal attention over cp. Without attention the contiguous order is better: a scan
    # then exchanges its states between neighbouring ranks.
    order: Order = "zigzag" if "*" in llm.kinds else "contiguous"
    inputs = PlanInputs(
        llm=layouts[SINK],
        encoders=uses,
        context=cfg.data.context,
        microbatches=cfg.schedule.microbatches,
        order=order,
        mtp_depths=llm.mtp_layers,
        llm_cost=document_cost(llm),
        limits=Limits(**cfg.data.limits.model_dump()),
        passes=outline.passes(cfg, llm),
        axes=llm.rope_axes is not None,
    )
    blueprint = Blueprint(cfg, world, llm, layouts, stages, inputs, known=known or Known())
    for m in blueprint.modules:
        blueprint.shards(m)  # raises where nodes do not allow it
    _check_adapters(blueprint)
    blueprint.schedule([set(uses)] * cfg.schedule.microbatches)  # raises where no schedule fits
    return blueprint


def _encoder_use(cfg: Config, name: str, layout: Layout, d_out: int) -> EncoderUse:
    """Import the encoder of module `name` and check its options and its layout. d_out: width of its rows."""
    from encoders.module import check_encoder, check_frozen
    from mm.plan.inputs import EncoderUse

    enc = cfg.model[name]
    cls = _encoder_class(enc.encoder, name)
    options = _encoder_options(cfg, name, cls)
    degrees = {d: getattr(layout, d) for d in ("tp", "cp", "pp", "ep", "etp")}
    try:
        check_encoder(cls, options, **degrees)
        check_frozen(cls, options, enc.freeze_layers)
    except Unfit as error:
        raise Unfit(f"model.{name}: {error.why}", error.works, name) from error
    except ValueError as error:
        raise ValueError(f"model.{name}: {error}") from error
    check_stages(layout, cls.layer_count(options))
    tp = layout.tp if cls.tensor_parallel else 1
    check_projector(name, enc.projector, tp, d_out)
    made = resampling(enc.projector, cls.feature_width(options), d_out)
    return EncoderUse(cls, options, layout, enc.deal, cfg.schedule.encoder_batch.get(name, 1), made)


def _encoder_options(cfg: Config, name: str, cls: type[encoders.Encoder]) -> Any:
    """The options of an encoder: the config's, over those of the folder that it has its weights from."""
    from encoders.hf import open_folder
    from encoders.hf.own import is_own, own_options
    from encoders.registry import implied_options

    enc = cfg.model[name]
    options = {**implied_options(enc.encoder), **enc.options}
    given: Any = build(cls.Config, options, f"model.{name}.options")
    if enc.weights is None:
        return given
    try:
        if is_own(enc.weights):
            return own_options(enc.weights, enc.encoder, given)
        return open_folder(enc.weights, enc.encoder).options(given, enc.options)
    except ValueError as error:
        raise ValueError(f"model.{name}.weights: {error}") from error


def _encoder_class(encoder: str, module: str) -> type[encoders.Encoder]:
    import encoders

    try:
        return encoders.resolve(encoder)
    except ValueError as error:
        raise ValueError(f"model.{module}.encoder: {error}") from error


def _check_adapters(blueprint: Blueprint) -> None:
    from mm.plan.adapters import check_adapters

    for m in blueprint.cfg.train.lora:
        whole = Stage(0, blueprint.stages[m][-1].stop, first=True, last=True)
        check_adapters(bare_module(blueprint, m, Axes(), whole), blueprint.cfg, m)


def bare_module(
    blueprint: Blueprint, name: str, axes: Axes, stage: Stage, device: torch.device | str = "meta"
) -> nn.Module:
    """A stage of module `name` with its global shapes; on the meta device it takes no memory.

    Raises Refused where an encoder's constructor raises ValueError, or leaves parameters undeclared.
    """
    from encoders.module import build_encoder_module
    from llm.model import LLM
    from mm.plan.adapters import adapt
    from parallel.sharding.param import seeded

    cfg, stored = blueprint.cfg, blueprint.stored_dtype
    module: nn.Module
    if name == SINK:
        module = LLM(blueprint.llm, axes, stage=stage, device=device, dtype=stored)
        module.recompute = recomputed(cfg.train, name)
        module.offload = cfg.train.offload
        module.requires_grad_(not blueprint.llm.freeze)
        return adapt(module, cfg, name)
    use, enc = blueprint.inputs.encoders[name], cfg.model[name]
    try:
        with seeded(name, cfg.run.seed):  # for random values that an encoder draws itself
            module = build_encoder_module(
                use.cls,
                use.cfg,
                d_out=blueprint.llm.d_model,
                projector_hidden=enc.projector.hidden,
                projector=projector_kind(enc.projector),
                axes=axes,
                stage=stage,
                device=device,
                dtype=stored,
            )
    except ValueError as error:
        raise Refused(f"model.{name}: {error}") from error
    module.encoder.recompute = "full" in recomputed(cfg.train, name)
    module.encoder.timeout_s = cfg.run.timeout_s
    module.freeze(enc.freeze, enc.freeze_layers)
    return adapt(module, cfg, name)
