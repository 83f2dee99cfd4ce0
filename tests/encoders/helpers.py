"""Items and encoder modules for tests."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import encoders
from encoders.audio.sound import Sound
from encoders.contract import Encoder, ItemBatch, pack_items
from encoders.module import EncoderModule, build_encoder_module
from encoders.projector import MLP, ProjectorKind
from encoders.vision.config import Pictures
from parallel.sharding.param import declared, initialise, own_specs
from parallel.topology.axis import Axes, Axis
from parallel.topology.stage import Stage

SMALL: dict[str, dict[str, Any]] = {
    "vit": {"width": 24, "heads": 12, "layers": 2, "mlp": 48, "max_grid": 16},
    "fastconformer": {"mels": 16, "channels": 4, "width": 24, "heads": 12, "layers": 2, "ffn": 48},
    "whisper": {
        "width": 24,
        "heads": 12,
        "layers": 2,
        "mlp": 48,
        "positions": 50,
        "sound": Sound(mels=16, seconds=1.0),
    },
    "wav2vec2": {
        "width": 24,
        "heads": 12,
        "layers": 2,
        "mlp": 48,
        "channels": (4, 6, 5),
        "kernels": (10, 3, 2),
        "strides": (5, 8, 4),
        "reach": 6,
        "groups": 2,
    },
    "parakeet": {
        "width": 24,
        "heads": 12,
        "layers": 2,
        "ffn": 48,
        "channels": 4,
        "sound": Sound(mels=16, size=512, emphasis=0.97),
    },
}
# The published vision families, with each switch in some of them.
NATIVE = {"patch": 2, "channels": 1, "width": 48, "heads": 12, "layers": 2, "mlp": 24}
NATIVE |= {"pictures": Pictures("none")}
VISION: dict[str, dict[str, Any]] = {
    "siglip": {"table": 3, "merge": 2},
    "siglip2": {"table": 3},
    "clip": {"table": 2},
    "dinov2": {"table": 4, "registers": 2, "gated": True, "activation": "silu", "prefix_rows": True},
    "dinov3": {"registers": 2, "merge": 2},
    "radio": {"table": 5, "class_tokens": 3},
    "internvl": {"table": 2, "merge": 2},
    "pixtral": {},
    "qwen2_5_vl": {"merged": 20, "window": 4, "full_layers": (1,)},
    "qwen3_vl": {"table": 3, "merged": 20, "levels": (0,)},
}
SMALL["audioflamingo3"] = SMALL["whisper"]
SMALL |= {name: {**NATIVE, **more} for name, more in VISION.items()}


Item = tuple[bytes, dict[str, int]]  # payload and metadata


def png(height: int, width: int, seed: int = 0, mode: str = "L") -> bytes:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: int, rate: int = 8000, width: int = 1, channels: int = 1, seed: int = 0) -> bytes:
    raw = np.random.default_rng(seed).integers(0, 256, samples * width * channels, dtype=np.uint8)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(raw.tobytes())
    return buffer.getvalue()


def item(name: str, size: Any, seed: int = 0) -> Item:
    """(payload, metadata): size is (height, width) of a picture or the samples of a clip."""
    if name == "vit" or name in VISION:
        return png(*size, seed=seed), {"height": size[0], "width": size[1]}
    return wav(size, seed=seed), {"samples": size, "rate": 8000}


def batch(
    name: str, sizes: Sequence[Any], dtype: torch.dtype = torch.float64, needed: range | None = None
) -> ItemBatch:
    """Items of these sizes; `needed`: those that have values, all of them by default."""
    cls = encoders.resolve(name)
    items = [item(name, size, seed) for seed, size in enumerate(sizes)]
    return batch_of(cls, cls.Config(**SMALL[name]), items, dtype, needed)


def batch_of(
    cls: type[Encoder],
    cfg: Any,
    items: Sequence[Item],
    dtype: torch.dtype = torch.float64,
    needed: range | None = None,
) -> ItemBatch:
    """These items as an encoder takes them; `needed`: those that have values, all of them by default."""
    some = range(len(items)) if needed is None else needed
    tensors = [cls.prepare(cfg, *items[i]) for i in some]
    metas = [meta for _, meta in items]
    return pack_items(cls, cfg, tensors, metas, device="cpu", dtype=dtype, first=some.start)


def module(
    name: str,
    axes: Axes | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    cls: type[Encoder] | None = None,
    stage: Stage | None = None,
    projector: ProjectorKind = MLP,
    **extra: Any,
) -> EncoderModule:
    """A small module, its weights sharded over axes.tp. cls: if not the registered one; extra: options."""
    cls = cls or encoders.resolve(name)
    built = build_encoder_module(
        cls,
        cls.Config(**{**SMALL[name], **extra}),
        d_out=20,
        projector_hidden=24,
        axes=axes or Axes(),
        projector=projector,
        stage=stage,
        dtype=dtype,
    )
    initialise(built, 0, name)
    for key, buffer in built.named_buffers():
        if key.endswith((".mean", ".variance")):  # of a batch norm: not 0 and 1, which would hide mistakes
            buffer.copy_(torch.linspace(0.5, 1.5, buffer.numel()))
    cut(built)
    return built


def cut(built: EncoderModule) -> None:
    """Leave of a whole module's weights what this rank of axes.tp holds."""
    tp = built.axes.tp
    for sub in built.modules():
        for key, spec in own_specs(sub).items():
            if spec.shard_dim is not None and tp.size > 1:
                part = getattr(sub, key).detach().chunk(tp.size, spec.shard_dim)[tp.rank]
                setattr(sub, key, torch.nn.Parameter(part.clone()))


def make_axes(cp: int, tp: int, sequence_parallel: bool = False) -> Axes:
    """Axes over all ranks of the default group, tp the faster."""
    rank = dist.get_rank()
    found = []
    for name, size, groups in (
        ("cp", cp, [[c * tp + t for c in range(cp)] for t in range(tp)]),
        ("tp", tp, [[c * tp + t for t in range(tp)] for c in range(cp)]),
    ):
        axis = Axis(name)
        for ranks in groups:
            group = dist.new_group(ranks) if size > 1 else None
            if rank in ranks and size > 1:
                axis = Axis(name, size, ranks.index(rank), group)
        found.append(axis)
    return Axes(cp=found[0], tp=found[1], sequence_parallel=sequence_parallel and tp > 1)


def gradient_error(nets: Sequence[EncoderModule], whole: EncoderModule) -> float:
    """Largest error of the gradients of `nets`, the stages of one module, against those of `whole`, relative
    to the largest gradient. Gradients are first summed over cp, and partial ones over tp."""
    expected = {key: p.grad for key, p in whole.named_parameters()}
    # Some gradients vanish in exact arithmetic (the bias of the keys): measure all against the largest.
    scale = max([float(g.abs().max()) for g in expected.values() if g is not None] + [1e-12])
    worst, seen = 0.0, set()
    for net in nets:
        cp, tp = net.axes.cp, net.axes.tp
        for key, p, spec in declared(net):
            seen.add(key)
            if expected[key] is None or p.grad is None:
                assert expected[key] is p.grad, f"{key} has a gradient on one side only"
                continue
            grad = p.grad.clone()
            for axis in (cp, tp) if spec.partial else (cp,):
                if axis.size > 1:
                    dist.all_reduce(grad, group=axis.group)
            want = expected[key]
            if spec.shard_dim is not None:
                want = want.chunk(tp.size, spec.shard_dim)[tp.rank]
            worst = max(worst, float((grad - want).abs().max()) / scale)
    assert seen == set(expected), seen ^ set(expected)
    return worst


SIZES: dict[str, list[Any]] = {
    "vit": [(8, 8), (4, 12), (8, 8), (12, 8)],
    "fastconformer": [3000, 1, 0, 4111, 799, 800],
    "whisper": [3000, 1],
    "audioflamingo3": [3000, 700, 200],
    "wav2vec2": [3000, 400, 4111, 400],
    "parakeet": [3000, 160, 4111],
}
