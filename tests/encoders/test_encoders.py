"""Encoders keep their contract: promised rows, items that never mix, no items, exact tensor parallelism."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import encoders
from encoders import compat
from encoders.contract import Encoder, Features, ItemBatch, pack_items
from encoders.fastconformer import Subsample, subsample_flops
from encoders.media.decode import read_sound
from encoders.module import RowsMismatch
from mm.data.probes import metadata
from tests.encoders.helpers import SIZES, SMALL, batch, gradient_error, make_axes, module, png, wav
from tests.kept import beside_activations
from tests.slow import on_demand

NAMES = ["vit", "fastconformer"]


@pytest.mark.parametrize("name", NAMES)
def test_items_packed_are_items_alone(name: str) -> None:
    net = module(name)
    together = net(batch(name, SIZES[name]))
    whole = batch(name, SIZES[name])
    at, rows = 0, 0
    for i, n in enumerate(whole.lengths):
        one = ItemBatch(whole.values[at : at + n], (n,), (whole.metas[i],))
        alone = net(one).values
        assert torch.allclose(alone, together.values[rows : rows + len(alone)], rtol=0, atol=1e-12)
        at, rows = at + n, rows + len(alone)
    assert rows == len(together.values) and together.cu_seqlens[-1] == rows


@pytest.mark.parametrize("name", NAMES)
def test_no_items_reach_every_parameter_with_a_zero_gradient(name: str) -> None:
    net = module(name)
    out = net(batch(name, []))
    assert out.values.shape == (0, 20) and out.rows == ()
    out.values.sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and not p.grad.any(), key


@pytest.mark.parametrize(("name", "one"), [("vit", (16, 16)), ("fastconformer", 1280)])
def test_no_weights_are_kept_as_activations(name: str, one: Any) -> None:
    net = module(name)
    fixed, an_item = beside_activations(lambda n: net(batch(name, [one] * n)).values, net)
    assert fixed == 0 < an_item


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=4))
def test_pictures_give_the_promised_rows(grids: list[tuple[int, int]]) -> None:
    module("vit")(batch("vit", [(4 * a, 4 * b) for a, b in grids]))  # raises where rows differ


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=4))
def test_clips_give_the_promised_rows(samples: list[int]) -> None:
    module("fastconformer")(batch("fastconformer", samples))


def tensor_parallel(name: str) -> float:
    """Largest relative error of output and of every gradient against the whole module."""
    net, whole = module(name, make_axes(1, dist.get_world_size())), module(name)
    items = batch(name, SIZES[name])
    weight = torch.randn(sum(whole(items).rows), 20, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = net(items).values, whole(items).values
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    worst = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
    return max(worst, gradient_error([net], whole))


@pytest.mark.parametrize("tp", on_demand([2, 3, 4], [2, 3]))
@pytest.mark.parametrize("name", NAMES)
def test_tensor_parallel_is_exact(name: str, tp: int, ranks: Any) -> None:
    assert max(ranks(tp, tensor_parallel, name)) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_changes_nothing(name: str) -> None:
    plain, again = module(name), module(name)
    again.encoder.recompute = True
    for net in (plain, again):
        net(batch(name, SIZES[name])).values.square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near(name: str) -> None:
    exact = module(name, dtype=torch.float32)(batch(name, SIZES[name], torch.float32)).values
    rough = module(name, dtype=torch.bfloat16)(batch(name, SIZES[name], torch.bfloat16)).values.float()
    assert (exact - rough).norm() / exact.norm() < 0.1


def test_freezing_by_group() -> None:
    net = module("vit")
    for what, encoder, projector in (("none", True, True), ("encoder", False, True), ("all", False, False)):
        net.freeze(what)
        assert all(p.requires_grad is encoder for p in net.groups()["encoder"])
        assert all(p.requires_grad is projector for p in net.groups()["projector"])


class Liar(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Features:
        good = super().forward(items)
        return Features(good.values[:-1], (*good.rows[:-1], good.rows[-1] - 1))


class Short(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Features:
        return super().forward(items)._replace(values=torch.zeros(3, 96))


def test_other_rows_than_promised_name_the_item() -> None:
    net = module("vit")
    net.encoder.__class__ = Liar
    with pytest.raises(RowsMismatch, match=r"item 3: Liar gave 5 rows, rows\(\) says 6"):
        net(batch("vit", SIZES["vit"]))
    net.encoder.__class__ = Short
    with pytest.raises(RowsMismatch, match=r"item 0: Short gave 3 rows here, rows\(\) says 17"):
        net(batch("vit", SIZES["vit"]))


class Bare(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Any:
        return super().forward(items).values


class Wide(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Features:
        good = super().forward(items)
        return good._replace(values=good.values[:, :-1])


class Untrained(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Features:
        good = super().forward(items)
        return good._replace(values=good.values.detach())


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Bare, "Bare.forward gave Tensor; needed: encoders.Features"),
        (Wide, "Wide.forward gave values .*, 95.; needed: .rows, 96., as feature_width"),
        (Untrained, "Untrained.forward gave values without a gradient"),
    ],
)
def test_features_that_cannot_be_used_are_refused(cls: Any, words: str) -> None:
    net = module("vit")
    net.encoder.__class__ = cls
    with pytest.raises((TypeError, ValueError), match=words):
        net(batch("vit", SIZES["vit"]))
    if cls is Untrained:
        net.freeze("encoder")
        net(batch("vit", SIZES["vit"]))


class Narrow(encoders.vit.ViT):
    def forward(self, items: ItemBatch) -> Features:
        good = super().forward(items)
        return good._replace(values=good.values.to(torch.bfloat16))


def test_an_encoder_may_compute_in_a_dtype_of_its_own() -> None:
    net = module("vit")
    plain = net(batch("vit", SIZES["vit"])).values
    net.encoder.__class__ = Narrow
    values = net(batch("vit", SIZES["vit"])).values
    assert values.dtype == plain.dtype != torch.bfloat16
    torch.testing.assert_close(values, plain, rtol=0.05, atol=0.05 * float(plain.detach().abs().max()))
    values.sum().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())


def test_inputs_of_another_shape_are_refused() -> None:
    vit = encoders.resolve("vit")
    inputs = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"ViT.prepare gave .5, 3.; needed: .n, 4., as input_shape says"):
        pack_items(vit, vit.Config(), [inputs], [{}], device="cpu", dtype=inputs.dtype)


class Ids(encoders.vit.ViT):
    input_dtype = torch.int64


def test_inputs_come_in_the_dtype_of_the_computation_or_in_the_encoders_own() -> None:
    vit = encoders.resolve("vit")

    def packed(cls: type[Encoder], *tensors: torch.Tensor) -> torch.Tensor:
        metas = [{} for _ in tensors]
        return pack_items(cls, vit.Config(), tensors, metas, device="cpu", dtype=torch.bfloat16).values

    times = torch.tensor([[1001.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert packed(vit, times).dtype == torch.bfloat16
    ids = packed(Ids, times.long())
    assert ids.dtype == torch.int64 and ids[0, 0] == 1001  # bfloat16 would round it to 1000
    assert packed(Ids).dtype == torch.int64


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=5))
def test_items_that_lie_together_are_packed_as_others_are(spans: list[tuple[int, int]]) -> None:
    vit, cfg = encoders.resolve("vit"), encoders.resolve("vit").Config()
    memory = torch.arange(40.0).reshape(10, 4)
    tensors = [memory[at : at + n] for at, n in spans]
    values = pack_items(vit, cfg, tensors, [{}] * len(spans), device="cpu", dtype=memory.dtype).values
    assert torch.equal(values, torch.cat(tensors))
    whole = pack_items(vit, cfg, memory.split([3, 0, 7]), [{}] * 3, device="cpu", dtype=memory.dtype).values
    assert whole.data_ptr() == memory.data_ptr() and torch.equal(whole, memory)
    odd = [memory[::5][:1], memory[1:3]]  # of a stride that is not that of the batch
    values = pack_items(vit, cfg, odd, [{}] * 2, device="cpu", dtype=memory.dtype).values
    assert torch.equal(values, memory[:3])
    across = [memory.T[:4].contiguous().T[n : n + 1] for n in range(3)]  # rows that do not lie in one piece
    mixed = pack_items(vit, cfg, across, [{}] * 3, device="cpu", dtype=memory.dtype).values
    assert torch.equal(mixed, memory[:3])


def test_unusable_items_are_refused_in_words() -> None:
    vit, conformer = encoders.resolve("vit"), encoders.resolve("fastconformer")
    cfg = vit.Config(**SMALL["vit"])
    with pytest.raises(ValueError, match="10x8 pixels; needed: multiples of 4"):
        vit.rows(cfg, {"height": 10, "width": 8})
    with pytest.raises(ValueError, match="max_grid is 16"):
        vit.rows(cfg, {"height": 64, "width": 8})
    with pytest.raises(ValueError, match="its index says 8x8"):
        vit.prepare(cfg, png(8, 12), {"height": 8, "width": 8})
    with pytest.raises(ValueError, match="16000 samples a second; this encoder needs 8000"):
        conformer.rows(conformer.Config(), {"samples": 9, "rate": 16000})


@pytest.mark.parametrize(
    ("mode", "held"),
    [("L", 1), ("1", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("grey P", 1)],
)
def test_colours_are_never_lost_in_silence(mode: str, held: int) -> None:
    image = (
        Image.new("RGB", (8, 8), (90, 90, 90))
        if mode == "I;16"
        else Image.open(io.BytesIO(png(8, 8, mode="RGB")))
    )
    if mode == "grey P":
        image = image.convert("L").convert("P")
    buffer = io.BytesIO()
    (image.convert("L") if mode == "I;16" else image).convert(mode.removeprefix("grey ")).save(buffer, "PNG")
    payload, vit = buffer.getvalue(), encoders.resolve("vit")
    meta = metadata("png", payload)
    assert meta == {"height": 8, "width": 8, "channels": held}
    for channels in (1, 3):
        cfg = vit.Config(**{**SMALL["vit"], "channels": channels})
        if held <= channels:
            assert vit.rows(cfg, meta) == 4
            planes = vit.prepare(cfg, payload, meta).view(-1, channels, 4)
            assert held > 1 or all(torch.equal(planes[:, 0], planes[:, c]) for c in range(channels))
            continue
        with pytest.raises(ValueError, match=r"colour picture.*channels is 1 .grey.*needed: channels=3"):
            vit.rows(cfg, meta)
        with pytest.raises(ValueError, match=r"colour picture.*channels is 1 .grey.*needed: channels=3"):
            vit.prepare(cfg, payload, {"height": 8, "width": 8})  # of an index that does not say


def test_costs_grow_with_the_item() -> None:
    vit, conformer = encoders.resolve("vit"), encoders.resolve("fastconformer")
    small, large = ({"height": s, "width": s} for s in (8, 32))
    assert 0 < vit.cost(vit.Config(), small) < vit.cost(vit.Config(), large)
    short, long = ({"samples": s, "rate": 8000} for s in (800, 8000))
    assert 0 < conformer.cost(conformer.Config(), short) < conformer.cost(conformer.Config(), long)


def test_a_subsampled_clip_costs_the_products_that_torch_counts() -> None:
    rows, mels, channels, width = 31, 16, 8, 24
    made = Subsample(mels, channels, width)
    with FlopCounterMode(display=False) as counted:
        made(torch.zeros(8 * rows, mels), [8 * rows])
    by_name = {str(op): n for op, n in counted.get_flop_counts()["Global"].items()}
    out = 2 * rows * width * channels * mels // 8
    # A clip has a gap of 8 frames after it.
    convolutions = (subsample_flops(rows, mels, channels, width) - out) * (rows + 1) / rows
    assert by_name == {"aten.convolution": convolutions, "aten.addmm": out}


def test_the_registry_explains_itself() -> None:
    with pytest.raises(ValueError, match="did you mean 'vit'"):
        encoders.resolve("vti")
    with pytest.raises(ValueError, match="cannot be imported"):
        encoders.resolve("no.such:Encoder")
    with pytest.raises(ValueError, match=r"not a subclass of encoders\.Encoder"):
        encoders.resolve("pathlib:Path")
    with pytest.raises(ValueError, match="exists already"):
        encoders.register("vit")(Liar)


def test_imports_are_repaired_before_a_plug_in_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plug-in imports may import torchvision, as transformers does (mm/jobs/test_wrapped.py)."""
    order: list[str] = []
    monkeypatch.setattr(compat, "repair", lambda: order.append("repaired"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path_seen", order, raising=False)
    (tmp_path / "eager_plugin.py").write_text(
        "import sys\nsys.path_seen.append('imported')\nclass Net: pass\n"
    )
    with pytest.raises(ValueError, match="not a subclass"):
        encoders.resolve("eager_plugin:Net")
    assert order == ["repaired", "imported"]


def test_both_paths_of_the_imports_agree() -> None:
    assert set(compat.status()) == {"torchvision", "torchaudio"}
    filters = compat.mel_filters(129, 40, 8000)
    assert torch.allclose(filters, compat.own_mel_filters(129, 40, 8000), atol=1e-6)
    module_, how = compat.torchaudio()
    if module_ is not None:
        wave_, _ = read_sound(wav(1000))
        settings_ = dict(sample_rate=8000, n_fft=256, win_length=200, hop_length=80, n_mels=16)
        import importlib

        theirs = importlib.import_module("torchaudio.transforms").MelSpectrogram(**settings_)(wave_)
        ours = compat.log_mel(wave_, rate=8000, mels=16, window=200, hop=80)
        assert torch.allclose(ours, (theirs.T + 1e-6).log(), atol=1e-4), how
