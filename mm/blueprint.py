"""What a config means on a number of ranks, worked out and checked before any process group exists.

check_outline() needs no torch, whose import takes seconds: what it can refuse is refused at once. An encoder
is a torch module, so draw_up() imports what it needs itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llm.config import LLMConfig
from llm.config import check as check_llm
from llm.presets import preset
from llm.recompute import recompute_parts
from llm.stages import cut, entering_levels, shared_parameters
from mm.config import Config, build
from mm.data.tokenizer import make_tokenizer
from mm.errors import Refused
from parallel.axis import Axes
from parallel.layout import Layout, check_divides, make_layout
from parallel.schedule import ModuleUse, SchedulePlan, make_schedule
from parallel.schedule.check import check
from parallel.schedule.plan import Params
from parallel.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    import encoders
    from mm.plan import Edge, EncoderUse, PlanInputs
    from parallel.stream import Order

SINK = "llm"


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
        from mm.plan import Edge

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
            plan = _schedule(self.cfg, self.layouts, layers, self.frozen, active, enters, train=train)
            check(plan)
            self._schedules[key] = plan
        return self._schedules[key]


def _schedule(
    cfg: Config,
    layouts: Mapping[str, Layout],
    layers: Mapping[str, int],
    frozen: Collection[str],
    active: Sequence[Collection[str]],
    enters: Mapping[str, tuple[int, ...]],
    *,
    train: bool,
) -> SchedulePlan:
    """The schedule that a config asks for; layers, enters: of the modules where they are known."""
    modules = {
        m: ModuleUse(layouts[m], m in frozen, weights_gathered(cfg, m), layers.get(m), enters.get(m, (0,)))
        for m in [*cfg.model, SINK]
    }
    return make_schedule(
        cfg.schedule.kind,
        modules,
        sink=SINK,
        active=active,
        ahead=cfg.schedule.ahead,
        batch=cfg.schedule.encoder_batch,
        train=train,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name that train.dtype may have."""
    import torch

    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def weights_gathered(cfg: Config, module: str) -> Params:
    """When a module's weights are gathered: for "each" forward and backward, as FSDP does, or once a
    "step" where the schedule has ranks of one dp group run an encoder at different times."""
    return "step" if cfg.schedule.kind == "fill" and module != SINK else "each"


def frozen_modules(cfg: Config, llm: LLMConfig) -> set[str]:
    """Modules without a single trainable parameter."""
    return {m for m, enc in cfg.model.items() if enc.freeze == "all"} | ({SINK} if llm.freeze else set())


def draw_up(cfg: Config, world: int) -> Blueprint:
    """Check a config against `world` ranks and work out its layouts; raises Refused in words."""
    try:
        return _draw_up(cfg, world)
    except ValueError as error:
        raise Refused(str(error)) from error


def check_outline(cfg: Config, world: int) -> None:
    """Check all of a config but its encoders, without torch; raises Refused as draw_up() would."""
    try:
        layouts, llm, stages = _outline(cfg, world)
        frozen, active = frozen_modules(cfg, llm), [set(cfg.model)] * cfg.schedule.microbatches
        _schedule(cfg, layouts, {SINK: stages[-1].stop}, frozen, active, {}, train=True)
    except ValueError as error:
        raise Refused(str(error)) from error


def _outline(cfg: Config, world: int) -> tuple[dict[str, Layout], LLMConfig, tuple[Stage, ...]]:
    """The layouts, the language model and its pipeline stages: all that needs no encoder."""
    for name in cfg.model:
        if name == "text" or not name.isidentifier():
            raise ValueError(
                f"model.{name}: no module can have this name; needed: letters, digits and _, and not text, "
                "which is what samples call text"
            )
    layouts = {m: make_layout(m, world, cfg.layout.get(m, {})) for m in [*cfg.model, SINK]}
    for name in cfg.layout.keys() - layouts.keys():
        near = difflib.get_close_matches(name, layouts, 1)
        hint = f"did you mean {near[0]}?" if near else f"the model's modules are {', '.join(layouts)}"
        raise ValueError(f"unknown key layout.{name}; {hint}")
    llm = llm_config(cfg)
    recompute_parts(cfg.train.recompute)
    for name, n in cfg.schedule.encoder_batch.items():
        _check_batch(name, n, layouts)
    check_llm(llm, layouts[SINK].tp, layouts[SINK].ep, layouts[SINK].etp)
    return layouts, llm, cut(llm, layouts[SINK].pp * layouts[SINK].vpp, (cfg.data.context,))


def _draw_up(cfg: Config, world: int) -> Blueprint:
    from encoders.module import encoder_stages
    from mm.plan import PlanInputs

    layouts, llm, llm_stages = _outline(cfg, world)
    uses, stages = {}, {}
    for name in cfg.model:
        uses[name] = use = _encoder_use(cfg, name, layouts[name])
        stages[name] = encoder_stages(use.cls, use.cfg, layouts[name].pp * layouts[name].vpp)
        _check_levels(name, use, llm)
    stages[SINK] = llm_stages
    # Causal attention is even over cp in zigzag order; a scan alone has its neighbours nearer in the other.
    order: Order = "zigzag" if "*" in llm.kinds else "contiguous"
    inputs = PlanInputs(
        layouts[SINK], uses, cfg.data.context, cfg.schedule.microbatches, order, llm.mtp_layers
    )
    blueprint = Blueprint(cfg, world, llm, layouts, stages, inputs)
    blueprint.schedule([set(uses)] * cfg.schedule.microbatches)  # refuses what no schedule can do
    return blueprint


def llm_config(cfg: Config) -> LLMConfig:
    """The language model: model.llm's options over those of its preset, which is a published model's name or
    a folder with a Hugging Face config.json."""
    vocab = make_tokenizer(cfg.data.tokenizer).vocab_size
    options, base = dict(cfg.llm), {"vocab_size": vocab}
    name = options.pop("preset", None)
    if not isinstance(name, str | None):
        raise ValueError(f"model.llm.preset is {name!r}; needed: a name or a folder")
    if name is not None and Path(name).is_dir():
        from llm.hf import SafeFolder, read_config

        base = asdict(read_config(SafeFolder(name).config()))
    elif name is not None:
        base = asdict(preset(name))
    llm = build(LLMConfig, {**base, **options}, "model.llm")
    if llm.vocab_size < vocab:
        raise ValueError(f"model.llm.vocab_size is {llm.vocab_size}; the tokenizer needs at least {vocab}")
    return llm


def _encoder_use(cfg: Config, name: str, layout: Layout) -> EncoderUse:
    from encoders.module import check_encoder
    from mm.plan import EncoderUse

    enc = cfg.model[name]
    cls = _encoder_class(enc.encoder, name)
    options = build(cls.Config, enc.options, f"model.{name}.options")
    try:
        check_encoder(cls, options, tp=layout.tp, cp=layout.cp, pp=layout.pp * layout.vpp)
    except ValueError as error:
        raise ValueError(f"model.{name}: {error}") from error
    check_divides(
        f"model.{name}.projector.hidden", enc.projector.hidden, "tp", layout.tp if cls.tensor_parallel else 1
    )
    return EncoderUse(cls, options, layout, enc.deal)


def _encoder_class(encoder: str, module: str) -> type[encoders.Encoder]:
    import encoders

    try:
        return encoders.resolve(encoder)
    except ValueError as error:
        raise ValueError(f"model.{module}.encoder: {error}") from error


def _check_batch(name: str, n: int, layouts: Mapping[str, Layout]) -> None:
    if name not in layouts or name == SINK:
        raise ValueError(
            f"schedule.encoder_batch names {name}; the encoders are {sorted({*layouts} - {SINK})}"
        )
    layout = layouts[name]
    cut = {a: getattr(layout, a) for a in ("cp", "pp") if getattr(layout, a) > 1}
    cut |= {"sequence_parallel": True} if layout.sequence_parallel and layout.tp > 1 else {}
    if n > 1 and cut:
        given = ", ".join(f"{a}={v}" for a, v in cut.items())
        raise ValueError(
            f"schedule.encoder_batch.{name}={n} with layout.{name} {given}: several micro-batches at once "
            f"need rows that are whole on each rank. Nearest: schedule.encoder_batch.{name}=1"
        )


def _check_levels(name: str, use: EncoderUse, llm: LLMConfig) -> None:
    levels = use.cls.feature_levels(use.cfg)
    if levels > 1 + len(llm.level_layers):
        raise ValueError(
            f"model.{name} gives {levels} levels of rows, but model.llm.level_layers names "
            f"{len(llm.level_layers)} layers; needed: one for each level after the first. Nearest: "
            f"{levels - 1} layers"
        )


def bare_module(
    blueprint: Blueprint, name: str, axes: Axes, stage: Stage, device: torch.device | str = "meta"
) -> nn.Module:
    """A stage of module `name` with its global shapes, on the meta device: declarations without memory.
    Raises Refused where an encoder's constructor does, in words, or leaves parameters undeclared."""
    from encoders.module import build_encoder_module
    from llm.model import LLM
    from parallel.param import seeded

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
    from parallel.param import declared

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
