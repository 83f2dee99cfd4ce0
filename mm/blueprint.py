"""What a config means on a number of ranks, worked out and checked before any process group exists."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

import encoders
from encoders.module import build_encoder_module, check_encoder, encoder_stages
from llm.config import LLMConfig
from llm.config import check as check_llm
from llm.hf import SafeFolder, read_config
from llm.model import LLM
from llm.presets import preset
from llm.recompute import recompute_parts
from llm.stages import cut, reading_stages, shared_parameters
from mm.advice import advise
from mm.config import Config, build
from mm.data.tokenizer import make_tokenizer
from mm.errors import Refused
from mm.plan import EncoderUse, PlanInputs
from parallel.axis import Axes
from parallel.context import Order
from parallel.layout import Changes, Layout, Unfit, check_divides, make_layout
from parallel.param import declared
from parallel.schedule import ModuleUse, SchedulePlan, make_schedule
from parallel.schedule.check import check
from parallel.schedule.plan import Params
from parallel.schedule.refuse import check_stages
from parallel.stage import Stage

SINK = "llm"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
        out = {m for m in self.inputs.encoders if self.cfg.model[m].freeze == "all"}
        return out | ({SINK} if self.llm.freeze else set())

    @property
    def dtype(self) -> torch.dtype:
        """What modules compute in."""
        return DTYPES[self.cfg.train.dtype]

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of weights and optimizer state: float32 under bfloat16 compute."""
        return torch.float64 if self.cfg.train.dtype == "float64" else torch.float32

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

    def carries(self, stage: int) -> tuple[str, ...]:
        """The encoders whose rows enter the language model again after its stage `stage`: their further
        levels travel on with the hidden states."""
        if stage >= max(reading_stages(self.llm, self.stages[SINK])):
            return ()
        return tuple(m for m in self.inputs.encoders if len(self.row_shape(m)) > 1)

    def row_shape(self, module: str) -> tuple[int, ...]:
        """Trailing shape of an encoder's rows: [d], or [levels, d]."""
        use = self.inputs.encoders[module]
        levels, d = use.cls.feature_levels(use.cfg), self.llm.d_model
        return (d,) if levels == 1 else (levels, d)

    def params(self, module: str) -> Params:
        """When a module's weights are gathered: for "each" forward and backward, as FSDP does, or once a
        "step" where the schedule has ranks of one dp group run an encoder at different times."""
        return "step" if self.cfg.schedule.kind == "fill" and module != SINK else "each"

    def schedule(self, active: Sequence[Collection[str]], *, train: bool = True) -> SchedulePlan:
        """The schedule of a step whose micro-batches have items of the encoders in `active`.

        Made and checked once for each pattern of active encoders.
        """
        key = (train, tuple(frozenset(a) for a in active))
        if key not in self._schedules:
            frozen, cfg = self.frozen, self.cfg.schedule
            modules = {
                m: ModuleUse(self.layouts[m], m in frozen, self.params(m), self.stages[m][-1].stop)
                for m in self.modules
            }
            plan = make_schedule(
                cfg.kind,
                modules,
                sink=SINK,
                active=active,
                ahead=cfg.ahead,
                batch=cfg.encoder_batch,
                train=train,
            )
            check(plan)
            self._schedules[key] = plan
        return self._schedules[key]


def draw_up(cfg: Config, world: int) -> Blueprint:
    """Check a config against `world` ranks and work out its layouts; raises Refused in words."""
    try:
        return _draw_up(cfg, world)
    except Unfit as error:
        raise Refused(advise(cfg, error, world, partial(_draw_up, world=world))) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def _draw_up(cfg: Config, world: int) -> Blueprint:
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
    _check_recompute(cfg, llm)
    if cfg.eval.every and not cfg.data.eval:
        why = f"eval.every={cfg.eval.every} would have no effect: data.eval names no held-out samples"
        raise Unfit(why, [{"eval.every": 0}])
    check_llm(llm, layouts[SINK].tp, layouts[SINK].ep, layouts[SINK].etp)
    uses, stages = {}, {}
    for name in cfg.model:
        uses[name] = use = _encoder_use(cfg, name, layouts[name])
        stages[name] = encoder_stages(use.cls, use.cfg, layouts[name].pp)
    _check_levels(uses, llm)
    check_stages(layouts[SINK], len(llm.symbols), virtual=True)
    stages[SINK] = cut(llm, layouts[SINK].pp * layouts[SINK].vpp, (cfg.data.context,))
    # Causal attention is even over cp in zigzag order; a scan alone has its neighbours nearer in the other.
    order: Order = "zigzag" if "*" in llm.kinds else "contiguous"
    inputs = PlanInputs(layouts[SINK], uses, cfg.data.context, cfg.schedule.microbatches, order)
    _check_schedule(cfg, layouts)
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
        base = asdict(read_config(SafeFolder(name).config()))
    elif name is not None:
        base = asdict(preset(name))
    llm = build(LLMConfig, {**base, **options}, "model.llm")
    if llm.vocab_size < vocab:
        raise ValueError(f"model.llm.vocab_size is {llm.vocab_size}; the tokenizer needs at least {vocab}")
    return llm


def _encoder_use(cfg: Config, name: str, layout: Layout) -> EncoderUse:
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
    try:
        return encoders.resolve(encoder)
    except ValueError as error:
        raise ValueError(f"model.{module}.encoder: {error}") from error


def _check_recompute(cfg: Config, llm: LLMConfig) -> None:
    """Refuse parts to compute again that are unknown, or in none of the model's layers."""
    kinds, parts = llm.kinds, recompute_parts(cfg.train.recompute)
    present = {
        "mlp": "-" in kinds or ("E" in kinds and llm.shared_ffn > 0),
        "moe_act": "E" in kinds,
        "attention_core": "*" in kinds,
        "scan": "M" in kinds,
    }
    for part in sorted(parts):
        if not present.get(part, True):
            left = sorted(p for p in parts if present.get(p, True))
            raise Unfit(
                f"train.recompute has {part}, but no layer of model.llm.pattern {llm.pattern!r} has it: it "
                "would have no effect",
                [{"train.recompute": left or False}],
            )


def _check_schedule(cfg: Config, layouts: Mapping[str, Layout]) -> None:
    """Refuse keys of the schedule that cannot be, or that would have no effect."""
    for name, n in cfg.schedule.encoder_batch.items():
        _check_batch(name, n, layouts, cfg.schedule.microbatches)
    ahead, sink = cfg.schedule.ahead, set(layouts[SINK].ranks)
    if ahead is None:
        return
    if not any(sink & set(layout.ranks) for m, layout in layouts.items() if m != SINK):
        why = f"is for encoders on ranks of {SINK}, and there are none, so it would have no effect"
    elif cfg.schedule.kind == "three_phase":
        why = "has no effect with schedule.kind=three_phase, whose encoders compute the whole step at once"
    else:
        return
    raise Unfit(f"schedule.ahead={ahead} {why}", [{"schedule.ahead": None}])


def _check_batch(name: str, n: int, layouts: Mapping[str, Layout], microbatches: int) -> None:
    if name not in layouts or name == SINK:
        raise ValueError(
            f"schedule.encoder_batch names {name}; the encoders are {sorted({*layouts} - {SINK})}"
        )
    key, layout = f"schedule.encoder_batch.{name}", layouts[name]
    if n > microbatches:
        why = f"{key}={n}, but the step has schedule.microbatches={microbatches}; needed: at most as many"
        raise Unfit(why, [{key: microbatches}, {"schedule.microbatches": n}, {key: 1}])
    cut = {a: getattr(layout, a) for a in ("cp", "pp") if getattr(layout, a) > 1}
    cut |= {"sequence_parallel": True} if layout.sequence_parallel and layout.tp > 1 else {}
    if n > 1 and cut:
        given = ", ".join(f"{a}={v}" for a, v in cut.items())
        raise Unfit(
            f"{key}={n} with layout.{name} {given}: several micro-batches at once need rows that are whole "
            "on each rank",
            [{key: 1}],
        )


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


def bare_module(blueprint: Blueprint, name: str, axes: Axes, stage: Stage) -> nn.Module:
    """A stage of module `name` with its global shapes, on the meta device: declarations without memory."""
    cfg, stored = blueprint.cfg, blueprint.stored_dtype
    module: nn.Module
    if name == SINK:
        module = LLM(blueprint.llm, axes, stage=stage, device="meta", dtype=stored)
        module.recompute = cfg.train.recompute
        module.offload = cfg.train.offload
        module.requires_grad_(not blueprint.llm.freeze)
        return module
    use, enc = blueprint.inputs.encoders[name], cfg.model[name]
    module = build_encoder_module(
        use.cls,
        use.cfg,
        d_out=blueprint.llm.d_model,
        projector_hidden=enc.projector.hidden,
        axes=axes,
        stage=stage,
        device="meta",
        dtype=stored,
    )
    module.encoder.recompute = "full" in recompute_parts(cfg.train.recompute)
    module.encoder.timeout_s = cfg.run.timeout_s
    module.freeze(enc.freeze)
    return module


def elements_per_rank(blueprint: Blueprint, name: str) -> int:
    """Weights of module `name` on the rank that holds most of them, by even shares."""
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
