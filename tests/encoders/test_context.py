"""Encoders split over cp, tp, sequence parallelism and stages equal the whole encoder, to 1e-9 in float64."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import encoders
from encoders.contract import Features, Meta
from encoders.module import EncoderModule, hidden_shape, needed_items
from encoders.projector import MLP, ProjectorKind
from encoders.resampler import Sizes
from encoders.share import encoder_row_spans
from encoders.vit import ViT
from parallel.topology.stage import partition_layers, whole
from tests.encoders.helpers import VISION, Item, batch, batch_of, gradient_error, item, make_axes, module
from tests.slow import on_demand

NAMES = ["vit", "fastconformer"]
# (cp, tp, sequence_parallel); encoders have 2 layers of 12 heads.
LAYOUTS = [
    (3, 1, False),
    (4, 1, False),
    (2, 2, False),
    (1, 3, True),
    (1, 4, True),
    (2, 2, True),
]


def draws(name: str) -> list[list[Any]]:
    """Sizes of items by batch: none, one row, fewer rows than ranks, one long item, no rows, many."""
    rng = random.Random(name)
    if name == "vit" or name in VISION:
        fixed: list[list[Any]] = [[], [(4, 4)], [(4, 4), (4, 8)], [(32, 28)]]
        return fixed + [
            [(4 * rng.randint(1, 5), 4 * rng.randint(1, 5)) for _ in range(rng.randint(2, 9))]
            for _ in range(3)
        ]
    if name != "fastconformer":  # which alone takes clips of no samples
        fixed = [[], [700], [400, 640], [9000], [2000, 400, 700, 2000]]
        return [*fixed, [rng.choice([200, 400, 640, 800, 2345, 5120]) for _ in range(rng.randint(2, 7))]]
    fixed = [[], [0, 0], [1], [700, 0, 640], [9000], [0, 2000, 0, 1, 0]]
    return fixed + [
        [rng.choice([0, 79, 640, 800, 2345, 5120]) for _ in range(rng.randint(2, 9))] for _ in range(2)
    ]


class Whole(ViT):
    """Not sharded over tp: every tp rank runs it whole."""

    tensor_parallel = False


def chained(
    given: Sequence[Item], nets: list[EncoderModule], metas: Sequence[Meta]
) -> tuple[Features, list[tuple[Tensor, Tensor]]]:
    """Features from stages that have only the items they need, and the hidden states between stages as
    (output of one, input of the next)."""
    seams: list[tuple[Tensor, Tensor]] = []
    found: Any = None
    for net in nets:
        needed = needed_items(type(net.encoder), net.cfg, metas, net.axes, net.stage)
        items = batch_of(type(net.encoder), net.cfg, given, needed=needed)
        if net.stage.first:
            found = net(items)
            continue
        assert not needed and items.values.shape[0] == 0
        taken = found.detach().requires_grad_()
        seams.append((found, taken))
        assert tuple(taken.shape) == hidden_shape(type(net.encoder), net.cfg, metas, net.stage, net.axes)
        found = net(items, taken)
    return found, seams


def compare(name: str, layout: tuple[int, int, bool], kind: str, extra: dict[str, Any]) -> float:
    """Largest error of features and gradients of this rank, over batches."""
    axes = make_axes(*layout)
    cls = Whole if kind.startswith("whole") else encoders.resolve(name)
    layers = extra.get("layers", 2)
    stages = partition_layers([1.0] * layers, 2) if kind.startswith("stages") else (whole(layers),)
    projector = RESAMPLER if "resampled" in kind else MLP
    nets = [module(name, axes, cls=cls, stage=stage, projector=projector, **extra) for stage in stages]
    alone = module(name, cls=cls, projector=projector, **extra)
    for net in nets:
        net.encoder.recompute = kind == "recompute"
    if kind == "frozen":
        for net in (*nets, alone):
            net.freeze("encoder")
    drawn = ([item(name, size, seed) for seed, size in enumerate(sizes)] for sizes in draws(name))
    return max(error(nets, alone, given) for given in drawn)


def error(nets: list[EncoderModule], alone: EncoderModule, given: Sequence[Item]) -> float:
    """Largest error of features and gradients of a module's stages on this rank, against the whole one."""
    axes = nets[0].axes
    for net in (*nets, alone):
        net.zero_grad()
    items = batch_of(type(alone.encoder), alone.cfg, given)
    expected = alone(items)
    found, seams = chained(given, nets, items.metas)
    a, b = encoder_row_spans(expected.rows, axes.cp.size, axes.tp.size, axes.sequence_parallel)[axes.cp.rank][
        axes.tp.rank
    ]
    assert (found.first, found.rows) == (a, expected.rows)
    weight = torch.randn(expected.values.shape, generator=torch.Generator().manual_seed(1)).double()
    (expected.values * weight).sum().backward()
    (found.values * weight[a:b]).sum().backward()
    for out, taken in reversed(seams):
        out.backward(taken.grad)
    assert found.values.shape == expected.values[a:b].shape
    off = (found.values - expected.values[a:b]).detach().abs()
    return max(float(off.max()) if off.numel() else 0.0, gradient_error(nets, alone))


@pytest.mark.parametrize("layout", on_demand(LAYOUTS, [(2, 2, False), (1, 3, True), (4, 1, False)]), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_split_encoder_is_the_whole_encoder(name: str, layout: tuple[int, int, bool], ranks: Any) -> None:
    assert max(ranks(layout[0] * layout[1], compare, name, layout, "plain", {})) < 1e-9


WAYS: list[tuple[str, tuple[int, int, bool], str, dict[str, Any]]] = [
    ("vit", (2, 2, True), "recompute", {}),
    ("fastconformer", (4, 1, False), "recompute", {}),
    ("fastconformer", (4, 1, False), "plain", {"kernel": 31}),
    ("fastconformer", (2, 2, True), "frozen", {}),
    ("vit", (2, 2, True), "whole", {}),
    ("vit", (2, 2, False), "whole", {}),
    ("vit", (1, 1, False), "stages", {"layers": 3, "levels": (0, 1)}),
    ("vit", (2, 2, True), "stages", {"layers": 3, "levels": (0, 2)}),
    ("vit", (2, 1, False), "recompute", {"levels": (0,)}),
    ("fastconformer", (2, 2, True), "stages", {}),
    ("fastconformer", (3, 1, False), "stages", {"layers": 3}),
]
RARELY = [w for w in WAYS if w[1] == (4, 1, False) or w[2] in ("whole", "frozen") or "levels" in w[3]]


@pytest.mark.parametrize(("name", "layout", "kind", "extra"), on_demand(WAYS, RARELY, several=True), ids=str)
def test_every_way_of_splitting_is_exact(
    name: str, layout: tuple[int, int, bool], kind: str, extra: dict[str, Any], ranks: Any
) -> None:
    assert max(ranks(layout[0] * layout[1], compare, name, layout, kind, extra)) < 1e-9


RESAMPLER = ProjectorKind("resampler", "silu", sizes=Sizes(3, 2, heads=8, kv_heads=4, head_dim=4))
RESAMPLED: list[tuple[str, tuple[int, int, bool], str, dict[str, Any]]] = [
    ("vit", (2, 2, True), "resampled", {}),
    ("vit", (3, 1, False), "resampled", {}),
    ("vit", (1, 4, True), "resampled", {}),
    ("vit", (2, 2, False), "whole resampled", {}),
    ("vit", (2, 2, True), "whole resampled", {}),
    ("vit", (2, 2, True), "stages resampled", {"layers": 3, "levels": (0, 2)}),
    ("fastconformer", (4, 1, False), "resampled", {}),
]
LATER = [w for w in RESAMPLED if w[0] != "vit" or w[2] != "resampled" or w[1] != (2, 2, True)]


@pytest.mark.parametrize(
    ("name", "layout", "kind", "extra"), on_demand(RESAMPLED, LATER, several=True), ids=str
)
def test_a_split_resampler_is_the_whole(
    name: str, layout: tuple[int, int, bool], kind: str, extra: dict[str, Any], ranks: Any
) -> None:
    """Items without a feature have no rows; items lie across cp ranks, and rows of one across them too."""
    assert max(ranks(layout[0] * layout[1], compare, name, layout, kind, extra)) < 1e-9


Split = tuple[str, tuple[int, int, bool], str]
SPLITS: list[Split] = [
    *((n, layout, "plain") for n in VISION for layout in ((3, 1, False), (1, 4, True), (2, 2, True))),
    *((n, (2, 2, True), "stages") for n in VISION),
    ("dinov3", (2, 2, False), "recompute"),
    ("qwen2_5_vl", (4, 1, False), "frozen"),
]
OFTEN: list[Split] = [("qwen2_5_vl", (3, 1, False), "plain"), ("dinov3", (2, 2, True), "stages")]


@pytest.mark.parametrize("split", on_demand(SPLITS, [s for s in SPLITS if s not in OFTEN]), ids=str)
def test_a_published_encoder_split_is_the_whole(split: Split, ranks: Any) -> None:
    name, layout, kind = split
    assert max(ranks(layout[0] * layout[1], compare, name, layout, kind, {})) < 1e-9


def silent_peer() -> str:
    """The error of rank 0 when its only cp peer does not answer."""
    axes = make_axes(2, 1)
    if axes.cp.rank == 1:
        time.sleep(2.0)
        return ""
    net = module("vit", axes)
    net.encoder.timeout_s = 0.5
    try:
        net(batch("vit", [(16, 16)]))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_silent_peer_is_named(ranks: Any) -> None:
    assert "keys of an encoder, forward: no answer from rank 1 within 0.5 s" in ranks(2, silent_peer)[0]
