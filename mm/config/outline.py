"""The outline of a config, which needs no encoder: layouts, the language model, its stages, the schedule.

It needs no torch, whose import takes seconds, so that most faults of a config are refused at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llm.checks import check as check_llm
from llm.config import LLMConfig
from llm.presets import preset
from llm.recompute import PARTS
from llm.stages import partition
from mm.config.build import build
from mm.config.nodes import node_size
from mm.config.schema import Config
from mm.config.training import recomputed
from mm.data.tokenizer import make_tokenizer
from parallel.schedule import ModuleUse, ScheduleOptions, SchedulePlan, make_schedule
from parallel.schedule.generators.refuse import check_stages
from parallel.schedule.plan import parameter_groups
from parallel.topology.data_parallel import AUTO, POLICIES, Policy, check_policy, shards_of
from parallel.topology.layout import Layout, Unfit, make_layout
from parallel.topology.stage import Stage, stages_of

SINK = "llm"


def check_outline(cfg: Config, world: int) -> None:
    """Raise ValueError (Unfit) or Refused where the outline of a config has a fault or no schedule."""
    layouts, llm, stages = outline(cfg, world)
    frozen, layers = frozen_modules(cfg, llm), {SINK: stages[-1].stop}
    modules = {}
    for m, layout in layouts.items():
        use = ModuleUse(layout, m in frozen, layers=layers.get(m), experts=m == SINK and "E" in llm.kinds)
        # By default a small language model keeps its weights whole, as pairs need; sizes are not known here.
        likely: Policy = "step" if m == SINK and cfg.schedule.overlap_experts else "zero3"
        modules[m] = with_policy(use, given_policy(cfg, layout) or likely, node_size(cfg, world))
    schedule_of(cfg, modules, [set(cfg.model)] * cfg.schedule.microbatches, train=True)


def outline(cfg: Config, world: int) -> tuple[dict[str, Layout], LLMConfig, tuple[Stage, ...]]:
    """The layouts by module, the language model and its pipeline stages.

    Raises ValueError (Unfit) or Refused for what is wrong with them.
    """
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
    _check_frozen_layers(cfg)
    llm = llm_config(cfg)
    _check_recompute(cfg, llm)
    if cfg.eval.every and not cfg.data.eval:
        why = f"eval.every={cfg.eval.every} would have no effect: data.eval names no held-out samples"
        raise Unfit(why, [{"eval.every": 0}])
    check_llm(llm, layouts[SINK].tp, layouts[SINK].ep, layouts[SINK].etp)
    check_stages(layouts[SINK], len(llm.symbols))
    _check_schedule(cfg, layouts)
    return layouts, llm, _stages(cfg, llm, layouts[SINK].pp * layouts[SINK].vpp)


def _stages(cfg: Config, llm: LLMConfig, n: int) -> tuple[Stage, ...]:
    """The language model in n stages; Megatron-LM's have equally many blocks, wherever the head is."""
    layers = len(llm.symbols)
    if cfg.run.engine == "megatron" and "|" not in llm.pattern and layers % (2 * n) == 0:
        return stages_of(range(0, layers + 1, layers // n))
    return partition(llm, n, (cfg.data.context,))


def schedule_of(
    cfg: Config, modules: Mapping[str, ModuleUse], active: Sequence[Collection[str]], *, train: bool
) -> SchedulePlan:
    """The schedule that a config asks for; raises ValueError (Unfit) where there is none.

    active: by micro-batch, the encoders with items.
    """
    pairs, kind = cfg.schedule.overlap_experts, cfg.schedule.kind
    if cfg.run.engine == "megatron" and kind == "auto" and _before_pipeline(modules):
        kind = "three_phase"
    return make_schedule(
        kind,
        modules,
        sink=SINK,
        active=active,
        options=ScheduleOptions(
            cfg.schedule.ahead,
            cfg.schedule.encoder_batch,
            overlap_experts=None if pairs == "auto" else pairs,
            train=train,
        ),
    )


def _before_pipeline(modules: Mapping[str, ModuleUse]) -> bool:
    """Whether all encoders are one stage on all ranks of a language model of several."""
    sink = modules[SINK].layout
    others = [use.layout for m, use in modules.items() if m != SINK]
    return sink.pp > 1 and all(x.pp == 1 and set(x.ranks) == set(sink.ranks) for x in others) and bool(others)


def given_policy(cfg: Config, layout: Layout) -> Policy | None:
    """The data-parallel policy that a config fixes for a module; None where its size decides.

    Under fill, an encoder's ranks of one dp group compute at different times, so its weights are gathered
    once a step. Megatron-LM's distributed optimizer is zero1.
    """
    if layout.data_parallel == AUTO and cfg.schedule.kind == "fill" and layout.module != SINK:
        return "step"
    if layout.data_parallel == AUTO and cfg.run.engine == "megatron":
        return "zero1"
    return check_policy(layout)


def with_policy(use: ModuleUse, policy: Policy, node_size: int | None) -> ModuleUse:
    """A module under a data-parallel policy, which means nothing where each weight is on one rank only.

    Raises Unfit where nodes of `node_size` ranks do not allow it.
    """
    shards = shards_of(use.layout, policy, node_size)
    if not parameter_groups(use.layout.module, use):
        return use
    return replace(use, params=POLICIES[policy].params, sums=POLICIES[policy].sums, shards=shards)


def frozen_modules(cfg: Config, llm: LLMConfig) -> set[str]:
    """Modules without any trainable parameter."""
    return {m for m, enc in cfg.model.items() if enc.freeze == "all"} | ({SINK} if llm.freeze else set())


def passes(cfg: Config, llm: LLMConfig) -> dict[str, float]:
    """PlanInputs.passes: encoders that are frozen as a whole have no backward. A frozen language model passes
    gradients on to whatever is trained below it. First layers that are frozen count as trained."""
    out = {m: 1.0 for m, enc in cfg.model.items() if enc.freeze in ("encoder", "all")}
    if SINK in frozen_modules(cfg, llm):
        out[SINK] = 1.0 if all(enc.freeze == "all" for enc in cfg.model.values()) else 2.0
    return out


def _check_frozen_layers(cfg: Config) -> None:
    """Refuse frozen layers of an encoder that is frozen as a whole."""
    for m, enc in cfg.model.items():
        if enc.freeze_layers and enc.freeze in ("encoder", "all"):
            why = (
                f"model.{m}.freeze_layers={enc.freeze_layers} would have no effect: model.{m}.freeze="
                f"{enc.freeze} freezes all of its layers"
            )
            less = "none" if enc.freeze == "encoder" else "projector"
            raise Unfit(why, [{f"model.{m}.freeze_layers": 0}, {f"model.{m}.freeze": less}])


def llm_config(cfg: Config) -> LLMConfig:
    """The language model: the options of model.llm, over those of its preset where it names one.

    A preset is a published model's name or a folder with a Hugging Face config.json. Raises ValueError for an
    unknown preset or too small a vocabulary, Refused for unknown options.
    """
    tokenizer = make_tokenizer(cfg.data.tokenizer)
    options, base = dict(cfg.llm), {"vocab_size": tokenizer.vocab_size}
    name = options.pop("preset", None)
    if not isinstance(name, str | None):
        raise ValueError(f"model.llm.preset is {name!r}; needed: a name or a folder")
    if name is not None and Path(name).is_dir():
        from llm.hf import read_config
        from parallel.published import SafeFolder

        base = asdict(read_config(SafeFolder(name).config()))
    elif name is not None:
        base = asdict(preset(name))
    llm: LLMConfig = build(LLMConfig, {**base, **options}, "model.llm")
    if llm.vocab_size < tokenizer.needed:
        raise ValueError(
            f"model.llm.vocab_size is {llm.vocab_size}; the tokenizer {cfg.data.tokenizer} needs at least "
            f"{tokenizer.needed}; needed: the tokenizer of the same model, or so many tokens"
        )
    return llm


def recomputable(llm: LLMConfig) -> frozenset[str]:
    """The parts to recompute that some layer of the model has."""
    kinds = llm.kinds
    present = {
        "mlp": "-" in kinds or ("E" in kinds and llm.shared_ffn > 0),
        "moe_act": "E" in kinds,
        "attention_core": "*" in kinds,
        "scan": "M" in kinds,
    }
    return frozenset(part for part in PARTS if present.get(part, True))


def _check_recompute(cfg: Config, llm: LLMConfig) -> None:
    """Refuse parts to recompute that are unknown, or that no layer of the model has."""
    parts = recomputed(cfg.train, SINK)
    key = "train.recompute" + (f".{SINK}" if isinstance(cfg.train.recompute, dict) else "")
    present = recomputable(llm)
    for part in sorted(parts):
        if part not in present:
            others = sorted(parts & present)
            raise Unfit(
                f"{key} has {part}, but no layer of model.llm.pattern {llm.pattern!r} has it: it "
                "would have no effect",
                [{key: others or False}],
            )


def _check_schedule(cfg: Config, layouts: Mapping[str, Layout]) -> None:
    """Refuse values of schedule.ahead and schedule.encoder_batch that are impossible or without effect."""
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
    key = f"schedule.encoder_batch.{name}"
    if n > microbatches:
        why = f"{key}={n}, but the step has schedule.microbatches={microbatches}; needed: at most as many"
        raise Unfit(why, [{key: microbatches}, {"schedule.microbatches": n}, {key: 1}])
