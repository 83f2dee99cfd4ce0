"""Quantised weights of published folders, read as bfloat16: of a block, only what is asked for.

A file holds a quantised tensor as two: small numbers, and a scale for each block of them. Here the two are
one tensor under its own name, so that nothing else has to know. Nothing is written quantised.

    mxfp4    two numbers of four bits a byte, a power of two for each 32 (OCP Microscaling Formats v1.0, 2023)
    fp8      E4M3 with a float32 factor for each 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.published.files import SafeFolder
from parallel.published.tables import Shape

BLOCK = 32
# The numbers of four bits, E2M1, by their code; the highest bit is the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127  # of the exponent that a scale is


def dequantised(folder: SafeFolder) -> SafeFolder:
    """The folder with every quantised tensor as one of bfloat16, under the key of the weight.

    Reads config.json and headers. Raises ValueError for another kind of quantisation, by name, and where one
    of a tensor's two parts is missing.
    """
    said = folder.config().get("quantization_config")
    if not said:
        return folder
    kind = said.get("quant_method")
    if kind == "mxfp4":
        return _joined(folder, "_blocks", "_scales", MXFP4)
    size = said.get("weight_block_size")
    if kind == "fp8" and size:
        return _joined(folder, "", "_scale_inv", lambda w, s: Blocks(w, s, (int(size[0]), int(size[1]))))
    what = kind if size or kind != "fp8" else "fp8 without weight_block_size"
    raise ValueError(
        f"{folder.path} is quantised as {what!r} (quantization_config in config.json); needed: mxfp4, fp8 in "
        "blocks, or weights that are not quantised"
    )


def _joined(folder: SafeFolder, small: str, scale: str, kind: Callable[[Any, Any], Any]) -> SafeFolder:
    """The folder with each pair of tensors KEY + small, KEY + scale as one, KEY."""
    slices = folder.slices()
    out: dict[str, Any] = {}
    paired = set()
    for key in slices:
        if not key.endswith(scale):
            continue
        stem = key.removesuffix(scale)
        if stem + small not in slices:
            raise ValueError(f"{folder.path} holds {key} without {stem + small}, which it is the scale of")
        out[stem] = kind(slices[stem + small], slices[key])
        paired |= {key, stem + small}
    return folder.with_slices({key: s for key, s in slices.items() if key not in paired} | out)


@dataclass(frozen=True)
class MXFP4:
    """Stacked matrices [E, d_in, d_out]: codes [E, d_out, d_in / 32, 16], scales [E, d_out, d_in / 32]. Has
    what a slice of a safetensors file has."""

    codes: Any
    scales: Any

    def get_shape(self) -> Shape:
        experts, out, blocks, _ = self.codes.get_shape()
        return (experts, blocks * BLOCK, out)

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        """A block, by slices of its three dims."""
        e, d_in, d_out = _whole(index, self.get_shape())
        blocks = slice(d_in.start // BLOCK, -(-d_in.stop // BLOCK))
        first = d_in.start - blocks.start * BLOCK
        shape = [s.stop - s.start for s in (e, d_in, d_out)]
        out = torch.empty(shape, dtype=torch.bfloat16)
        # One expert at a time: the wide indices of all would be many times the result.
        for i in range(len(out)):
            one = slice(e.start + i, e.start + i + 1)
            found = unpack(self.codes[one, d_out, blocks][0], self.scales[one, d_out, blocks][0])
            out[i] = found[:, first : first + out.shape[1]].T
        return out


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [.., n, 16] uint8, the lower four bits first, and scales [.., n] uint8 to bfloat16 [.., 32 n]."""
    table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.bfloat16)
    values = table[torch.stack([codes & 15, codes >> 4], -1).int()].flatten(-2)
    return torch.ldexp(values, scales.int().unsqueeze(-1) - BIAS).flatten(-2)


@dataclass(frozen=True)
class Blocks:
    """A matrix [R, C] of E4M3 with a factor for each block of `size`: [ceil(R / size), ceil(C / size)]. Has
    what a slice of a safetensors file has."""

    numbers: Any
    factors: Any
    size: tuple[int, int]

    def get_shape(self) -> Shape:
        return tuple(self.numbers.get_shape())

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        """A block, by slices of its two dims."""
        spans = _whole(index, self.get_shape())
        factors = self.factors[
            tuple(slice(s.start // n, -(-s.stop // n)) for s, n in zip(spans, self.size, strict=True))
        ]
        for dim, (s, n) in enumerate(zip(spans, self.size, strict=True)):
            at = torch.arange(s.start, s.stop) // n - s.start // n
            factors = factors.index_select(dim, at)
        wide: Tensor = self.numbers[spans].float() * factors
        return wide.to(torch.bfloat16)


def _whole(index: Any, shape: Shape) -> tuple[slice, ...]:
    """Slices with both bounds for all dims; index: slices of the first dims, or ... for none."""
    given = () if index is ... else tuple(index)
    given += (slice(None),) * (len(shape) - len(given))
    bounds = [s.indices(n)[:2] for s, n in zip(given, shape, strict=True)]
    return tuple(slice(first, max(first, last)) for first, last in bounds)
