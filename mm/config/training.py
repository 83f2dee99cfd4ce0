"""The training recipe: its keys, and which values go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from llm.recompute import recompute_parts
from mm.config.build import Section, unknown_key
from mm.errors import Refused

Beta = Annotated[float, Field(ge=0, lt=1)]
Recompute = bool | str | list[str]
MOMENTUM = 0.95  # of Muon
MAX_NONFINITE = 10


class LoraConfig(Section):
    """Low-rank adapters of a module, whose own weights are then frozen (parallel/sharding/low_rank.py)."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: list[str] = Field(["all-linear"], min_length=1)
    weights: str | None = None


class SpikeConfig(Section):
    """When the loss counts as jumped, and how often the run goes back."""

    factor: float = Field(
        2.0, gt=1, description="a step is high where its loss is above so many times the median"
    )
    window: int = Field(
        100, ge=2, description="steps that the median is taken of, the last that were not high"
    )
    steps: int = Field(3, ge=1, description="high steps in a row that the run goes back at")
    most: int = Field(5, ge=0, description="how often it goes back; after that it ends with code 5")


class TrainConfig(Section):
    """The training recipe."""

    steps: int = Field(ge=1, description="steps of the run")
    global_batch: int = Field(ge=1, description="samples a step, over all ranks")
    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        "float32", description="dtype that modules compute in: float64, float32 or bfloat16"
    )
    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate that the decay ends at, at most train.lr")
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps in which the rate rises linearly to train.lr"
    )
    decay: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the steps in which the rate falls to train.min_lr; together with "
        "train.warmup at most 1; 0 keeps it",
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(
        "linear",
        description="how it falls: linear, cosine, or sqrt: 1 - sqrt(share of the decay that is done)",
    )
    lr_by: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="highest learning rates in the place of train.lr, by module (vision) or by part "
        "(vision.encoder, vision.projector); warm-up and decay are in proportion",
    )
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {}, description="by module, the factor on a layer's rate for each layer that is above it"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon: for matrices the momentum made orthogonal, AdamW for all else; both "
        "take train.lr",
    )
    momentum: float = Field(MOMENTUM, ge=0, lt=1, description="Muon's decay rate of the momentum")
    moments: Literal["stored", "bfloat16"] = Field(
        "stored", description="dtype of AdamW's moments: that of the stored weights, or bfloat16"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's decay rates of its two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's term in the denominator")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay")
    clip: float = Field(1.0, ge=0, description="bound on the global gradient norm, 0 for none")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="where a loss or gradient is not finite, stop: end the run, or skip: leave the weights "
        "as they are and go on",
    )
    max_nonfinite: int = Field(
        MAX_NONFINITE, ge=1, description="most of the last 1,000 steps that train.nonfinite=skip leaves out"
    )
    check_replicas: int = Field(
        0,
        ge=0,
        description="every so many steps, ranks that hold the same weights compare hashes of them; 0: never",
    )
    spike: SpikeConfig | None = Field(
        None,
        description="where the loss jumps, go back to the last checkpoint and leave out the batches since",
    )
    lora: dict[str, LoraConfig] = Field(
        {},
        description="by module, adapters that are trained in the place of its weights: rank, alpha, targets, "
        "weights",
    )
    average: float | None = Field(
        None, gt=0, lt=1, description="decay of an exponential average of the weights, such as 0.999"
    )
    recompute: Recompute | dict[str, Recompute] = Field(
        False,
        description="true to recompute whole layers in the backward, or names of their parts, or either by "
        "module; encoders know whole layers only",
    )
    offload: int | None = Field(
        None,
        ge=1,
        description="least size in bytes of the language model's activations that wait on the host",
    )
    statistics: int = Field(
        0, ge=0, description="every so many steps, statistics of each layer in the metrics; 0: never"
    )
    shard: Literal["module", "layer"] = Field(
        "module", description="what FSDP gathers at once: a module, or each layer"
    )


def recomputed(train: TrainConfig, module: str) -> frozenset[str]:
    """The parts of a module's layers that the backward computes again (llm.recompute.PARTS)."""
    given = train.recompute
    return recompute_parts(given.get(module, False) if isinstance(given, dict) else given)


def check_train(train: TrainConfig, encoders: Sequence[str], trace: int | None) -> None:
    """Refuse values that are legal alone but not together. trace: run.trace."""
    if train.min_lr > train.lr:
        raise Refused(f"train.min_lr is {train.min_lr}; needed: at most train.lr, {train.lr}")
    if train.warmup + train.decay > 1:
        rest = round(1 - train.warmup, 6)
        rest -= 1e-6 * (train.warmup + rest > 1)  # few digits, rounded so that the sum is at most 1
        raise Refused(
            f"train.warmup={train.warmup} and train.decay={train.decay} are fractions of the steps; needed: "
            f"together at most 1; nearest: train.decay={rest:.6g}"
        )
    if train.min_lr > 0 and train.decay == 0:
        raise Refused(
            f"train.min_lr={train.min_lr} is where the rate goes down to, but train.decay=0 leaves it as it "
            "is, so it would have no effect; nearest: train.min_lr=0"
        )
    if train.max_nonfinite != MAX_NONFINITE and train.nonfinite == "stop":
        raise Refused(
            f"train.max_nonfinite={train.max_nonfinite} has no effect with train.nonfinite=stop; nearest: "
            "train.nonfinite=skip"
        )
    _check_optimizer(train, encoders)
    _check_recompute(train, encoders)
    if trace is not None and trace > train.steps:
        raise Refused(f"run.trace is {trace}; needed: a step of the run, at most train.steps={train.steps}")


def _check_recompute(train: TrainConfig, encoders: Sequence[str]) -> None:
    given = train.recompute
    if not isinstance(given, dict):
        return
    for name in given:
        if name not in (*encoders, "llm"):
            raise Refused(unknown_key(f"train.recompute.{name}", name, [*encoders, "llm"]))
        try:
            parts = recomputed(train, name)
        except ValueError as error:
            raise Refused(f"train.recompute.{name}: {error}") from error
        if name in encoders and parts - {"full"}:
            raise Refused(
                f"train.recompute.{name}={given[name]!r}, but encoders know whole layers only; nearest: "
                f"train.recompute.{name}=true"
            )


def _check_optimizer(train: TrainConfig, encoders: Sequence[str]) -> None:
    parts = [f"{m}.{part}" for m in encoders for part in ("encoder", "projector")]
    modules = [*encoders, "llm"]
    known = {"lr_by": [*modules, *parts], "layer_decay": modules, "lora": modules}
    for key, names in known.items():
        for name in getattr(train, key):
            if name not in names:
                raise Refused(unknown_key(f"train.{key}.{name}", name, names))
    for name, lora in train.lora.items():
        if lora.weights is not None and name != "llm":
            raise Refused(
                f"train.lora.{name}.weights={lora.weights}, but folders of peft are read for the language "
                "model alone; needed: train.lora.llm.weights"
            )
    if train.moments == "bfloat16" and train.betas[1] > 0.99:
        raise Refused(
            f"train.moments=bfloat16 with train.betas={list(train.betas)}: changes of less than 1/256 of the "
            "second moment are lost in bfloat16; needed: a second beta of at most 0.99, such as "
            "train.betas=[0.9, 0.95]"
        )
    if train.momentum != MOMENTUM and train.optimizer != "muon":
        raise Refused(
            f"train.momentum={train.momentum} is Muon's and has no effect with train.optimizer="
            f"{train.optimizer}; nearest: train.optimizer=muon"
        )
