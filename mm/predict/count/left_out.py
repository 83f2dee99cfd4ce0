"""What of a job the counts leave out or count as something else, in words: said wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterator

from encoders.fastconformer import FastConformer
from encoders.vit import ViT
from mm.plan.blueprint import Blueprint
from mm.predict.count.vision import is_written


def left_out(blueprint: Blueprint) -> list[str]:
    """A sentence for each thing of a job that is not counted as it runs; none where all is."""
    return [*_model(blueprint), *_encoders(blueprint), *_training(blueprint)]


def _model(blueprint: Blueprint) -> Iterator[str]:
    llm = blueprint.llm
    if "*" in llm.kinds:
        if llm.kv_rank is not None:
            yield (
                f"latent attention (model.llm.kv_rank={llm.kv_rank}) is counted as plain attention of "
                f"{llm.n_heads} heads of {llm.head_dim}: its own products, messages and memory differ"
            )
        if llm.attention_cap is not None or llm.attention_sinks:
            yield "bounds of attention's scores and sinks are counted as if they cost nothing"


def _encoders(blueprint: Blueprint) -> Iterator[str]:
    for name, use in blueprint.inputs.encoders.items():
        if is_written(use) and use.cfg.merged and name in blueprint.cfg.train.lora:
            yield f"{name}: adapters of what merges patches are counted roughly, FLOPs up to 5 % high"
        elif is_written(use) and use.cfg.prefix and use.layout.tp > 1:
            yield (
                f"{name}: FLOPs and messages over tp are counted roughly, within 4 %, where items have class "
                "tokens"
            )
        elif not is_written(use) and use.cls not in (ViT, FastConformer):
            yield (
                f"{name}: layers of {use.cls.__name__} are counted by its cost() and as 34 bytes a token and "
                "feature (arXiv 2205.05198)"
            )
        if use.resample is not None:
            yield f"{name}: the projector makes other rows than it is given, which is not counted"


def _training(blueprint: Blueprint) -> Iterator[str]:
    train = blueprint.cfg.train
    if train.offload is not None:
        yield "activations that wait on the host (train.offload) are counted as held on the device"
    if train.shard == "layer":
        yield "sums of gradients are counted at the end of a backward, not where train.shard=layer has them"
    for name, given in train.lora.items():
        if any("." in target or any(c in target for c in "*?[") for target in given.targets):
            yield (
                f"targets of train.lora.{name} with a path or wildcards are looked for among the last parts "
                "of names: what they mean by more than that is counted as without adapters"
            )
