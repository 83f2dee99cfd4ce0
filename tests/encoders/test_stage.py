"""Stages hold their own layers under global names; what an encoder cannot do is refused."""

from __future__ import annotations

import pytest
import torch

import encoders
from encoders.module import build_encoder_module, check_encoder, encoder_stages, module_flops
from encoders.vit import ViT, ViTConfig
from parallel.topology.axis import Axes
from parallel.topology.stage import Stage, partition_layers
from tests.encoders.helpers import SIZES, SMALL, batch, module


class Plain(ViT):
    """An encoder that declares nothing."""

    tensor_parallel = context_parallel = pipeline = False


@pytest.mark.parametrize("name", ["vit", "fastconformer"])
def test_stages_have_the_parameters_of_the_whole_once(name: str) -> None:
    alone = dict(module(name, layers=4).named_parameters())
    found: dict[str, torch.Tensor] = {}
    for stage in partition_layers([1.0] * 4, 3):
        part = dict(module(name, layers=4, stage=stage).named_parameters())
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[key], alone[key]) for key in alone)


def test_levels_are_the_outputs_of_their_layers() -> None:
    """Level k of a deep encoder is the main level of one that ends there, but for the last norm."""
    items = batch("vit", SIZES["vit"])
    deep = module("vit", layers=3, levels=(0, 1))
    values = deep.encoder(items).values
    assert values.shape == (sum(deep(items).rows), 3, 96)
    assert deep(items).values.shape == (len(values), 3, 20)
    assert torch.equal(values[:, 0], module("vit", layers=3).encoder(items).values)
    for level in (0, 1):
        short = module("vit", layers=3)
        short.encoder.blocks = torch.nn.ModuleDict(list(short.encoder.blocks.items())[: level + 1])
        short.encoder.stage = Stage(0, level + 1)
        short.encoder.norm = torch.nn.Identity()
        assert torch.equal(short.encoder(items).values, values[:, 1 + level])


def test_levels_that_are_no_layers_are_refused() -> None:
    for levels in ((1, 0), (0, 0), (2,), (-1,)):
        with pytest.raises(ValueError, match=r"vit levels are .*needed: ascending layers of 0-1, each once"):
            check_encoder(ViT, ViTConfig(**{**SMALL["vit"], "levels": levels}))


def test_degrees_that_an_encoder_does_not_declare_are_refused() -> None:
    cfg = ViTConfig(**SMALL["vit"])
    check_encoder(ViT, cfg, tp=4, cp=7, pp=2)
    check_encoder(Plain, cfg, tp=5)  # replicated: any tp
    with pytest.raises(
        ValueError, match=r"Plain is given cp=2, but does not declare context_parallel; .*cp=1"
    ):
        check_encoder(Plain, cfg, cp=2)
    with pytest.raises(ValueError, match=r"Plain is given pp=2, but does not declare pipeline; .*pp=1"):
        check_encoder(Plain, cfg, pp=2)
    with pytest.raises(ValueError, match=r"ViT is given pp=3, but has 2 layers; .*nearest: pp=2"):
        check_encoder(ViT, cfg, pp=3)
    with pytest.raises(
        ValueError, match=r"ViT is given ep=2 etp=3, but .* no experts.*; nearest: ep=1 etp=1"
    ):
        check_encoder(ViT, cfg, ep=2, etp=3)
    with pytest.raises(ValueError, match="vit heads is 12, which does not divide by tp=5"):
        check_encoder(ViT, cfg, tp=5)


def test_stages_weigh_the_stem_and_the_projector() -> None:
    cls = encoders.resolve("fastconformer")
    even = cls.Config(layers=8)
    assert [len(s.layers) for s in encoder_stages(cls, even, 4)] == [2, 2, 2, 2]
    heavy = cls.Config(layers=8, channels=256, width=48)
    first, *_, last = encoder_stages(
        cls, heavy, 4, meta={"samples": 80000, "rate": 8000}, d_out=64, projector_hidden=64
    )
    assert len(first.layers) < len(last.layers)


def test_more_levels_cost_more_projection() -> None:
    meta = {"height": 8, "width": 8}
    one, three = ViTConfig(), ViTConfig(levels=(0, 1))
    costs = [module_flops(ViT, cfg, meta, 64, 32) - ViT.cost(cfg, meta) for cfg in (one, three)]
    assert costs[1] == 3 * costs[0] > 0


def test_freezing_the_encoder_leaves_every_projector() -> None:
    net = module("vit", levels=(0,))
    net.freeze("encoder")
    trained = {key for key, p in net.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in net.named_parameters() if "projector" in key}
    assert any(key.startswith("level_projectors.0.") for key in trained)


def test_sums_over_tp_are_declared_where_rows_are_cut_over_it() -> None:
    from parallel.sharding.param import declared

    for cls in (ViT, Plain):
        for sp in (False, True):
            axes = Axes(sequence_parallel=sp)
            net = build_encoder_module(
                cls, ViTConfig(**SMALL["vit"]), d_out=8, projector_hidden=24, axes=axes, device="meta"
            )
            for key, _, spec in declared(net):
                assert spec.partial == (sp and spec.shard_dim is None), key
                assert cls is ViT or spec.shard_dim is None
