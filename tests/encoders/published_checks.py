"""Published encoders against transformers' classes: what tests and the table of docs/encoders.md hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.hf import load_hf
from encoders.hf.folder import open_folder
from parallel.published import module_shapes
from parallel.published.tables import parts_by_name
from tests.encoders import published

ROUNDED = ("siglip2", "dinov2", "dinov2_giant", "dinov2_registers", "radio")


def ours_of(grads: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Gradients by the names of transformers' files, as our parameters have them."""
    opened = open_folder(folder)
    shapes = module_shapes(load_hf(folder).encoder)
    out = {}
    for name, [(tensor, part)] in parts_by_name(opened.tensors).items():
        whole = grads[tensor.key].reshape(-1, *shapes[name][1:])
        out[name] = whole[part.first : part.first + shapes[name][0]]
    return out


def file_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """The model's gradients under the names that its files have: those of a copy whose weights they are."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    published.saved(model, folder)
    return load_file(folder / "model.safetensors")


def close(a: Tensor, b: Tensor, bound: float, what: str) -> None:
    assert a.shape == b.shape, (what, a.shape, b.shape)
    error = float((a - b).detach().abs().max())
    assert error <= bound * max(1.0, float(b.detach().abs().max())), (what, error)


def hold_exact(
    name: str, folder: Path, dtype: torch.dtype, bound: float, seed: int = 0, **options: Any
) -> None:
    """A model's last hidden state and the gradients of all its weights, of transformers and ours."""
    model = published.oracle(name, dtype, seed, **options)
    net = load_hf(published.saved(model, folder / "in"))
    assert next(net.parameters()).dtype == dtype
    for i, given in enumerate(published.inputs(name, model, dtype=dtype)):
        model.zero_grad()
        net.zero_grad()
        expected = published.real(name, given, published.run(name, model, given))
        weight = torch.cos(torch.arange(expected.numel(), dtype=dtype)).view(expected.shape)
        (expected * weight).sum().backward()
        found = published.real(name, given, net.features(given))
        close(found, expected, bound, f"{name} {dtype} {i} {options}")
        (found * weight).sum().backward()
        grads = {n: p.grad for n, p in net.encoder.named_parameters() if p.grad is not None}
        copy = published.oracle(name, dtype, seed, **options)
        for p, q in zip(copy.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        theirs = ours_of(file_gradients(copy, folder / str(i)), folder / "in")
        scale = max(float(g.abs().max()) for g in theirs.values())
        for key, wanted in theirs.items():
            got = grads.get(key, torch.zeros_like(wanted))
            # Theirs rounds gradients of some tables to float32, which would depend on the layout here.
            rounded = key == "position" and name in ROUNDED
            most = max(10 * bound, 1e-6 if rounded else 0.0)
            assert float((got - wanted).abs().max()) <= most * scale, (key, dtype, i, options)
