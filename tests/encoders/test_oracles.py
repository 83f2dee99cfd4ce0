"""Both encoders against implementations by others, with copied weights: features and gradients in float64."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import tests.llm.oracle  # noqa: F401  makes transformers importable
from encoders.compat import torchaudio, torchvision
from encoders.contract import ItemBatch
from encoders.module import EncoderModule
from encoders.vit import ViT, ViTConfig
from tests.encoders.helpers import SMALL, module, png

from transformers import (  # isort: skip
    LlamaConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention  # isort: skip

WIDTH, HEADS, LAYERS, PATCH = 24, 3, 3, 2
PICTURES = [(8, 12), (4, 4), (12, 8)]
CLIPS = [2300, 80, 801]


def ours(name: str, **options: Any) -> EncoderModule:
    """An encoder in which nothing is at a special value that could hide a mistake."""
    net = module(name, layers=LAYERS, heads=HEADS, **options)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return net


def lift(features: Tensor) -> Tensor:
    """A scalar in which every feature counts differently."""
    return (features.flatten() * torch.cos(torch.arange(features.numel(), dtype=features.dtype))).sum()


def same(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, what
    assert float((a - b).detach().abs().max()) <= 1e-10 * max(1.0, float(b.detach().abs().max())), what


def pictures(channels: int = 1) -> list[Tensor]:
    """[channels, height, width] in [-1, 1]."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.uniform(-1, 1, (channels, *size))) for size in PICTURES]


def patches(images: list[Tensor]) -> ItemBatch:
    """The batch that the encoder receives: patches row by row, the pixels of each channel by channel."""
    columns = [F.unfold(image[None], PATCH, stride=PATCH)[0].T for image in images]
    metas = [{"height": i.shape[1], "width": i.shape[2]} for i in images]
    return ItemBatch(torch.cat(columns), tuple(len(c) for c in columns), tuple(metas))


def fours(states: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches row by row [n, d] to a row of each two by two of them [n / 4, 4 d]."""
    grid = states.view(size[0] // PATCH, size[1] // PATCH, -1).permute(2, 0, 1)
    blocks = F.pixel_unshuffle(grid, 2)  # [d 4, h / 2, w / 2]
    return blocks.unflatten(0, (-1, 4)).permute(2, 3, 1, 0).flatten(0, 1).flatten(1)


def positions(net: Any, size: tuple[int, int]) -> Tensor:
    """Of every patch, row by row."""
    down, across = size[0] // PATCH, size[1] // PATCH
    return (net.row_position[:down, None] + net.column_position[None, :across]).flatten(0, 1)


def copied(theirs: nn.Module, weights: Mapping[str, Tensor], zero: list[str]) -> None:
    """Put our weights into `theirs`, and zeros into the biases that ours lacks."""
    named = dict(theirs.named_parameters())
    assert {*weights, *zero} == set(named), {*weights, *zero} ^ set(named)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(weights[name].reshape(p.shape) if name in weights else torch.zeros(()))


def siglip(net: Any) -> tuple[SiglipVisionModel, dict[str, Tensor], list[str]]:
    """transformers' vision model, our parameters by its names, and its names that ours lacks."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=SMALL["vit"]["mlp"],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_channels=3,
        image_size=PATCH,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    names = {
        "embeddings.patch_embedding.weight": net.patch.weight,
        "embeddings.patch_embedding.bias": net.patch.bias,
        "post_layernorm.weight": net.norm.weight,
        "post_layernorm.bias": net.norm.bias,
    }
    zero = ["embeddings.position_embedding.weight"]
    for i, block in net.blocks.items():
        at = f"encoder.layers.{i}."
        for k in ("weight", "bias"):
            names |= {f"{at}layer_norm{j}.{k}": getattr(getattr(block, f"norm{j}"), k) for j in (1, 2)}
        for k in "qkv":
            names |= {f"{at}self_attn.{k}_proj.weight": getattr(block, k)}
            names |= {f"{at}self_attn.{k}_proj.bias": getattr(block, f"bias_{k}")}
        names |= {
            f"{at}self_attn.out_proj.weight": block.out.weight,
            f"{at}mlp.fc2.weight": block.down.weight,
        }
        names |= {f"{at}mlp.fc1.weight": block.up.weight, f"{at}mlp.fc1.bias": block.up.bias}
        zero += [f"{at}self_attn.out_proj.bias", f"{at}mlp.fc2.bias"]
    return SiglipVisionModel(config).double().train(), names, zero


def hold_gradients(theirs: nn.Module, names: Mapping[str, Tensor], net: nn.Module, own: list[str]) -> None:
    """Every parameter of ours is one of theirs with the same gradient, or one of `own`."""
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in names.items():
        assert p.grad is not None and p.grad.any() and grads[name] is not None, name
        same(p.grad, grads[name].reshape(p.grad.shape), name)
    compared = {id(p) for p in names.values()}
    assert {n for n, p in net.named_parameters() if id(p) not in compared} == set(own)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_cut_into_patches(mode: str) -> None:
    payload, channels = png(8, 12, mode=mode), len(Image.new(mode, (1, 1)).getbands())
    pixels = np.array(Image.open(io.BytesIO(payload))).reshape(8, 12, channels)
    cfg = ViTConfig(channels=channels)
    found = ViT.prepare(cfg, payload, {"height": 8, "width": 12})
    expected = patches([torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1])
    torch.testing.assert_close(found, expected.values.to(found.dtype), rtol=0, atol=1e-6)


def test_the_projector_is_its_formula() -> None:
    net = ours("vit")
    features = net.encoder(patches(pictures())).values.detach()
    p = net.projector
    normed = features / (features.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p.norm
    expected = (normed @ p.up.weight.T).clamp(min=0) ** 2 @ p.down.weight.T
    same(net(patches(pictures())).values, expected, "projected")


def test_the_vision_transformer_is_siglips() -> None:
    net = ours("vit", channels=3, levels=(0, 1)).encoder
    theirs, names, zero = siglip(net)
    copied(theirs, names, zero)
    images = pictures(channels=3)
    found = net(patches(images)).values
    expected, tables = [], []
    for image, size in zip(images, PICTURES, strict=True):
        position = positions(net, size)
        # Theirs are learned for square pictures of one size: each of our pictures gets a table of its own.
        table = nn.Embedding.from_pretrained(position.detach(), freeze=False)
        theirs.embeddings.position_embedding = table
        theirs.embeddings.position_ids = torch.arange(len(position))[None]
        out = theirs(pixel_values=image[None], output_hidden_states=True)
        levels = [out.last_hidden_state, out.hidden_states[1], out.hidden_states[2]]
        expected.append(torch.stack([fours(x[0], size) for x in levels], 1))
        tables.append((position, table.weight))
    same(found, torch.cat(expected), "features")
    lift(found).backward()
    lift(torch.cat(expected)).backward()
    hold_gradients(theirs, names, net, ["row_position", "column_position"])
    got = [net.row_position.grad.clone(), net.column_position.grad.clone()]
    net.zero_grad()
    for position, table in tables:
        position.backward(table.grad)
    for mine, grad in zip(got, (net.row_position.grad, net.column_position.grad), strict=True):
        assert mine.any()
        same(mine, grad, "positions")


def test_the_vision_transformer_is_torchvisions() -> None:
    vision, how = torchvision()
    assert vision is not None, how
    import torchvision.models.vision_transformer as models

    net = ours("vit").encoder
    found = net(patches(pictures())).values
    expected = []
    for image, size in zip(pictures(), PICTURES, strict=True):
        position = positions(net, size)
        theirs = models.Encoder(
            len(position), LAYERS, HEADS, WIDTH, SMALL["vit"]["mlp"], dropout=0.0, attention_dropout=0.0
        ).double()
        names = {"pos_embedding": position, "ln.weight": net.norm.weight, "ln.bias": net.norm.bias}
        zero = []
        for i, b in net.blocks.items():
            at = f"layers.encoder_layer_{i}."
            for k in ("weight", "bias"):
                names |= {f"{at}ln_{j}.{k}": getattr(getattr(b, f"norm{j}"), k) for j in (1, 2)}
            names[f"{at}self_attention.in_proj_weight"] = torch.cat([b.q, b.k, b.v])
            names[f"{at}self_attention.in_proj_bias"] = torch.cat([b.bias_q, b.bias_k, b.bias_v])
            names |= {f"{at}self_attention.out_proj.weight": b.out.weight, f"{at}mlp.3.weight": b.down.weight}
            names |= {f"{at}mlp.0.weight": b.up.weight, f"{at}mlp.0.bias": b.up.bias}
            zero += [f"{at}self_attention.out_proj.bias", f"{at}mlp.3.bias"]
        copied(theirs, names, zero)
        embedded = F.conv2d(image[None], net.patch.weight.view(WIDTH, 1, PATCH, PATCH), net.patch.bias, PATCH)
        expected.append(fours(theirs(embedded.flatten(2).transpose(1, 2))[0], size))
    same(found, torch.cat(expected), "features")


class GroupNorm(nn.Module):
    """The norm that ours has instead of a batch norm; encoders.fastconformer gives the reasons."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight, self.groups = nn.Parameter(torch.empty(channels)), groups

    def forward(self, x: Tensor) -> Tensor:  # [batch, channels, time]
        grouped = x.unflatten(1, (self.groups, -1))
        return (grouped / (grouped.square().mean(2, keepdim=True) + 1e-5).sqrt()).flatten(1, 2) * self.weight[
            :, None
        ]


class Rotary(nn.Module):
    """Llama's attention, put where Parakeet has its own: ours has rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
        config._attn_implementation = "sdpa"
        self.inner = LlamaAttention(config, 0)
        self.inner.is_causal = False

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        half = WIDTH // HEADS // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(hidden_states.shape[1])[:, None] * speed).repeat(1, 2)[None]
        return self.inner(hidden_states, (angle.cos(), angle.sin()))[0], None


def parakeet(net: Any) -> tuple[ParakeetEncoder, dict[str, Tensor], list[str]]:
    """transformers' FastConformer with our activation, norm and positions; our parameters by its names."""
    options = SMALL["fastconformer"]
    config = ParakeetEncoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=options["ffn"],
        convolution_bias=False,
        conv_kernel_size=9,
        subsampling_conv_channels=options["channels"],
        num_mel_bins=options["mels"],
        scale_input=False,
        dropout=0.0,
        layerdrop=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
    )
    theirs = ParakeetEncoder(config)
    convolutions = theirs.subsampling.layers
    for i, layer in enumerate(convolutions):
        if isinstance(layer, nn.ReLU):
            convolutions[i] = nn.SiLU()
    sub = net.subsample
    names = {
        "subsampling.layers.0.weight": sub.conv,
        "subsampling.layers.0.bias": sub.conv_bias,
        "subsampling.linear.weight": sub.out.weight,
        "subsampling.linear.bias": sub.out.bias,
    }
    zero = []
    for i, at in ((1, 2), (2, 5)):
        names[f"subsampling.layers.{at}.weight"] = getattr(sub, f"depth{i}")
        names[f"subsampling.layers.{at + 1}.weight"] = getattr(sub, f"point{i}")
        names[f"subsampling.layers.{at + 1}.bias"] = getattr(sub, f"point_bias{i}")
        zero.append(f"subsampling.layers.{at}.bias")
    norms = {"norm_feed_forward1": "ff1.norm", "norm_self_att": "norm_att", "norm_conv": "norm_conv"}
    norms |= {"norm_feed_forward2": "ff2.norm", "norm_out": "norm_out"}
    for i, block in net.blocks.items():
        layer, at = theirs.layers[int(i)], f"layers.{i}."
        layer.self_attn, layer.conv.norm = Rotary(), GroupNorm(WIDTH, HEADS)
        for their, our in norms.items():
            norm = block.get_submodule(our)
            names |= {f"{at}{their}.weight": norm.weight, f"{at}{their}.bias": norm.bias}
        for j in (1, 2):
            ff = getattr(block, f"ff{j}")
            names |= {f"{at}feed_forward{j}.linear1.weight": ff.up.weight}
            names |= {f"{at}feed_forward{j}.linear1.bias": ff.up.bias}
            names |= {f"{at}feed_forward{j}.linear2.weight": ff.down.weight}
            zero.append(f"{at}feed_forward{j}.linear2.bias")
        names |= {f"{at}self_attn.inner.{k}_proj.weight": getattr(block, k) for k in "qkv"}
        names[f"{at}self_attn.inner.o_proj.weight"] = block.att_out.weight
        names[f"{at}conv.depthwise_conv.weight"] = block.depth
        names[f"{at}conv.norm.weight"] = block.group_norm
        names[f"{at}conv.pointwise_conv2.weight"] = block.conv_out.weight
    for part in theirs.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6
    return theirs.double().train(), names, zero


def test_the_fastconformer_is_parakeets() -> None:
    net = ours("fastconformer").encoder
    theirs, names, zero = parakeet(net)
    # One convolution of theirs makes values and gates.
    glu = {f"layers.{i}.conv.pointwise_conv1.weight": (b.value, b.gate) for i, b in net.blocks.items()}
    copied(theirs, names | {n: torch.cat(pair) for n, pair in glu.items()}, zero)
    rng = np.random.default_rng(0)
    frames = [torch.from_numpy(rng.normal(size=(n // 80 + 1, 16))) for n in CLIPS]
    metas = tuple({"samples": n, "rate": 8000} for n in CLIPS)
    found = net(ItemBatch(torch.cat(frames), tuple(map(len, frames)), metas)).values
    expected = torch.cat([theirs(input_features=f[None]).last_hidden_state[0] for f in frames])
    same(found, expected, "features")
    lift(found).backward()
    lift(expected).backward()
    grads = dict(theirs.named_parameters())
    for name, (value, gate) in glu.items():
        same(torch.cat([value.grad, gate.grad]), grads[name].grad.squeeze(-1), name)
    own = [f"blocks.{i}.{k}" for i in range(LAYERS) for k in ("value", "gate")]
    hold_gradients(theirs, names, net, own)


@pytest.mark.parametrize("kernel", [3, 9])
def test_the_convolution_is_torchaudios(kernel: int) -> None:
    audio, how = torchaudio()
    assert audio is not None, how
    from torchaudio.models.conformer import _ConvolutionModule

    net = ours("fastconformer", kernel=kernel).encoder
    block = net.blocks["0"]
    theirs = _ConvolutionModule(WIDTH, WIDTH, kernel, bias=False)
    theirs.sequential[3], theirs.layer_norm.eps = GroupNorm(WIDTH, HEADS), 1e-6
    names = {
        "layer_norm.weight": block.norm_conv.weight,
        "layer_norm.bias": block.norm_conv.bias,
        "sequential.0.weight": torch.cat([block.value, block.gate]),
        "sequential.2.weight": block.depth,
        "sequential.3.weight": block.group_norm,
        "sequential.5.weight": block.conv_out.weight,
    }
    theirs = theirs.double()
    copied(theirs, names, [])
    seen: list[Tensor] = []
    convolve = block._convolve
    block._convolve = lambda x, ctx: seen.extend((x, convolve(x, ctx))) or seen[1]
    rng = np.random.default_rng(0)
    frames = [torch.from_numpy(rng.normal(size=(n // 80 + 1, 16))) for n in CLIPS]
    metas = tuple({"samples": n, "rate": 8000} for n in CLIPS)
    net(ItemBatch(torch.cat(frames), tuple(map(len, frames)), metas))
    rows = [-(-len(f) // 8) for f in frames]
    expected = [theirs(x[None])[0] for x in seen[0].split(rows)]
    same(seen[1], torch.cat(expected), "convolution")


@pytest.mark.parametrize("merge", [1, 3])
def test_a_row_is_a_square_of_patches_of_any_side(merge: int) -> None:
    whole, net = (ours("vit", channels=3, merge=n).encoder for n in (1, merge))
    with torch.no_grad():
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            p.copy_(q)
    size = (6 * PATCH, 12 * PATCH)
    image = patches([torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, *size)))])
    grid = whole(image).values.view(6, 12, -1)  # a row a patch, row by row
    squares = grid.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2)
    assert net.rows(net.cfg, image.metas[0]) == 72 // merge**2
    same(net(image).values, squares.flatten(0, 1).flatten(1), "rows")
