"""Any encoder of the transformers package as one of ours: model.<m>.encoder: "hf:FOLDER".

It runs as it is, whole on every tp rank, in eval mode whether it is trained or not: so it neither drops
anything nor depends on chance. Items of equal size run as one batch, all others one at a time, so no item is
padded and none sees another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil, prod
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from encoders import compat, foreign
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.foreign import ForeignOptions, Probe, Size
from encoders.layers import run_layer
from encoders.media.decode import read_sound
from encoders.media.pictures import picture
from encoders.registry import register
from parallel.sequence.host import to_device
from parallel.sharding.adopt import adopt
from parallel.sharding.dtypes import FactoryKwargs
from parallel.topology.axis import Axes

SIZES: dict[str, tuple[Size, ...]] = {
    "image": ((64, 96), (224, 160), (300, 401)),
    "audio": ((16000,), (37123,), (8001,)),
}


class Core(nn.Module):
    """A class of transformers, from its inputs to one tensor of features."""

    def __init__(self, inner: nn.Module, opts: ForeignOptions) -> None:
        super().__init__()
        self.inner, self.opts = inner, opts

    def forward(self, main: str, values: Tensor, others: dict[str, Tensor]) -> Tensor:
        return foreign.pick(self.inner(**{main: values}, **others), self.opts)


@register("hf")
class ForeignEncoder(Encoder):
    """Pictures, or clips of PCM wav of any rate, to the rows that the folder's own class gives.

    Pictures become colour and are resized by the folder's processor; clips are resampled to its rate and cut
    at `seconds`. Input values are flat: the shape of an item's input follows from its size.
    """

    Config = ForeignOptions

    def __init__(self, cfg: ForeignOptions, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__(cfg, axes, **factory)
        self.cfg = cfg
        inner = foreign.read(cfg, factory["dtype"])
        for name in foreign.untrained(cfg, _some(cfg)):
            inner.get_parameter(name).requires_grad_(False)
        self.core = adopt(Core(inner, cfg), **factory)
        self.same = _one_shape(cfg)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The longest list of equal modules. FSDP gathers these on every call, which all ranks must make as
        often, so there are none where batches differ in how many shapes they have."""
        lists = [list(m) for m in self.core.modules() if isinstance(m, nn.ModuleList)]
        equal = [m for m in lists if len({type(x) for x in m}) == 1]
        return max(equal, key=lambda m: len(m)) if equal and self.same else ()

    @classmethod
    def feature_width(cls, cfg: ForeignOptions) -> int:
        return _some(cfg).width

    @classmethod
    def rows(cls, cfg: ForeignOptions, meta: Meta) -> int:
        return foreign.probe(cfg, _size(cfg, meta)).rows

    @classmethod
    def cost(cls, cfg: ForeignOptions, meta: Meta) -> float:
        return foreign.probe(cfg, _size(cfg, meta)).flops

    @classmethod
    def input_shape(cls, cfg: ForeignOptions) -> tuple[int, ...]:
        return ()

    @classmethod
    def input_count(cls, cfg: ForeignOptions, meta: Meta) -> int:
        return prod(foreign.probe(cfg, _size(cfg, meta)).shape)

    @classmethod
    def example(cls, cfg: ForeignOptions, rows: int) -> Meta:
        modality, _ = foreign.processor(cfg)
        if modality == "image":
            return {"height": SIZES["image"][0][0], "width": SIZES["image"][0][1], "channels": 3}
        n, per = SIZES["audio"][0][0], _some(cfg).rows
        longer = 1 if _one_shape(cfg) else max(1, rows // per)
        return {"samples": n * longer, "rate": foreign.rate(cfg)}

    @classmethod
    def check(cls, cfg: ForeignOptions, tp: int) -> None:
        if not cfg.folder:
            raise ValueError("the encoder hf needs a folder; needed: encoder: hf:FOLDER")
        if cfg.seconds <= 0 or cfg.drop < 0:
            raise ValueError(
                f"hf is given seconds={cfg.seconds:g}, drop={cfg.drop}; needed: above 0, at least 0"
            )
        _some(cfg)

    @classmethod
    def prepare(cls, cfg: ForeignOptions, payload: bytes, meta: Meta) -> Tensor:
        modality, _ = foreign.processor(cfg)
        content: Any = picture(payload).convert("RGB") if modality == "image" else _clip(cfg, payload)
        known = foreign.probe(cfg, _size(cfg, meta))
        values = foreign.process(cfg, content)[known.main]
        if tuple(values.shape) != known.shape:
            raise ValueError(
                f"the processor of {cfg.folder} gave {list(values.shape)}, for the size in the index "
                f"{list(known.shape)}: the file has another size than its index says"
            )
        return values.flatten()

    def forward(self, batch: ItemBatch) -> Features:
        probes = [foreign.probe(self.cfg, _size(self.cfg, meta)) for meta in batch.metas]
        if not probes:  # such classes cannot run on none: run on one item of zeros and return no row of it
            some = _some(self.cfg)
            zeros = batch.values.new_zeros(some.shape)
            return Features(self._run(some, [zeros])[0][:0], ())
        parts = torch.split(batch.values, [prod(p.shape) for p in probes])
        items = [x.view(p.shape) for x, p in zip(parts, probes, strict=True)]
        groups: dict[Any, list[int]] = {}
        for i, known in enumerate(probes):
            groups.setdefault(known.key if known.batched else i, []).append(i)
        if self.same and len(groups) > 1:
            raise ValueError(
                f"{self.cfg.folder}: its processor made inputs of {len(groups)} shapes, though sizes tried "
                "before gave one; needed: train.shard=module, or pictures of one size"
            )
        found: dict[int, Tensor] = {}
        for group in groups.values():
            found |= zip(group, self._run(probes[group[0]], [items[i] for i in group]), strict=True)
        return Features(torch.cat([found[i] for i in range(len(items))]), tuple(p.rows for p in probes))

    def _run(self, known: Probe, items: list[Tensor]) -> list[Tensor]:
        """The rows of each of these items, whose inputs differ in content alone."""
        device, n = items[0].device, len(items)
        others = {k: to_device(torch.cat([v] * n), device) for k, v in known.others.items()}
        features = run_layer(self.core, self.recompute, known.main, torch.cat(items), others)
        each = features.chunk(n) if n > 1 else [features]
        return [foreign.table(x, self.cfg.drop) for x in each]


def _some(cfg: ForeignOptions) -> Probe:
    return foreign.probe(cfg, SIZES[foreign.processor(cfg)[0]][0])


@cache
def _one_shape(cfg: ForeignOptions) -> bool:
    """Whether the folder's processor makes items of any size equally large."""
    some = _some(cfg)
    try:
        return all(foreign.probe(cfg, size).like(some) for size in SIZES[foreign.processor(cfg)[0]])
    except ValueError:
        return False


def _size(cfg: ForeignOptions, meta: Meta) -> Size:
    """What the shapes of an item depend on. Raises ValueError for one without content."""
    if foreign.processor(cfg)[0] == "image":
        return meta["height"], meta["width"]
    n = min(ceil(meta["samples"] * foreign.rate(cfg) / meta["rate"]), int(cfg.seconds * foreign.rate(cfg)))
    if n < 1:
        raise ValueError("a clip of no samples; needed: at least one, or no clip in the sample")
    return (n,)


def _clip(cfg: ForeignOptions, payload: bytes) -> Tensor:
    samples, given = read_sound(payload)
    return compat.resample(samples, given, foreign.rate(cfg))[: int(cfg.seconds * foreign.rate(cfg))]
