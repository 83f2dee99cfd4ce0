"""Jobs of Qwen's vision-language models: loss and gradients are transformers', and alike in any layout."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from encoders.hf.folder import open_folder
from llm.hf.weights import checkpoint_tensors
from mm.checkpoint.weights import fill_encoders, start_from
from mm.data.tokenizer import Tokenizer
from mm.train.one_step import train_step
from mm.train.step import run_step
from parallel.published import join
from parallel.sharding.param import local
from tests.encoders.helpers import png
from tests.llm.qwen_vl import MERGE, NAMES, build, text_folder
from tests.llm.widened import Widened
from tests.mm.harness import largest_difference, running, small
from tests.mm.shards import write_shard
from tests.slow import on_demand

IDS = {"vocab": 264, "image": Tokenizer().placeholder_of("vision")}


def shards(folder: Path, n: int = 12) -> Path:
    """Samples of no to three pictures of several sizes, with text between them."""
    r, samples = random.Random(3), []
    for k in range(n):
        sizes = [(r.choice([8, 16, 24]), r.choice([8, 24])) for _ in range(r.choice([0, 1, 2, 3]))]
        parts = {f"img{i}.png": png(h, w, seed=10 * k + i, mode="RGB") for i, (h, w) in enumerate(sizes)}
        segments: list[dict[str, Any]] = []
        for i, name in enumerate(parts):
            segments += [{"text": "a" * (1 + i), "loss": False}, {"vision": name}]
        segments.append({"text": f"sees {k}"})
        samples.append({"key": f"s{k}", "segments": segments, "parts": parts})
    return write_shard(folder / "a.tar", samples).parent


def made(name: str, folder: Path, seed: int) -> tuple[Any, dict[str, Any]]:
    """A model of transformers, and the config of a job that starts from its folders."""
    theirs = build(name, seed, **IDS)
    text_folder(theirs, folder / "text")
    held = theirs.state_dict()
    (folder / "tower").mkdir()
    theirs.config.save_pretrained(folder / "tower")
    tower = {k.removeprefix("model."): t.clone() for k, t in held.items() if ".visual." in k}
    save_file(tower, folder / "tower" / "model.safetensors", {"format": "pt"})
    pictures = {"pictures": {"least": 64, "most": 400}}
    levels = getattr(theirs.config.vision_config, "deepstack_visual_indexes", ())
    raw = small(data={"train": [str(shards(folder) / "*.tar")], "context": 160})
    raw["model"] = {
        "vision": {
            "encoder": name,
            "weights": str(folder / "tower"),
            "projector": {"kind": "none"},
            "options": pictures,
        },
        "llm": {"preset": str(folder / "text"), "level_layers": [2 * k + 1 for k in range(len(levels))]},
    }
    return theirs, raw


def filled(job: Any, raw: Mapping[str, Any]) -> None:
    start_from(job, [Path(raw["model"]["llm"]["preset"])])
    fill_encoders(job)


def first_gradients(raw: dict[str, Any]) -> dict[str, Any]:
    """Of one process: the inputs of the first step, its loss and all gradients."""
    with running(raw) as (job, feed):
        filled(job, raw)
        prepared, _ = feed.next(0, 1)
        result = run_step(job, prepared, train=True)
        grads = {
            f"{m}.{n}": local(p.grad).clone()
            for m, parts in job.parts.items()
            for part in parts.values()
            for n, p in part.named_parameters()
            if p.grad is not None
        }
        seen = [(mb.llm, mb.items["vision"]) for mb in prepared.micro if mb.llm is not None]
        return {
            "loss": float(result.losses.sum()),
            "grads": grads,
            "seen": seen,
            "per": prepared.plan.supervised,
        }


def their_loss(theirs: Any, found: Mapping[str, Any]) -> Tensor:
    """The same step by transformers, a document at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for text, items in found["seen"]:
        grids = torch.tensor([[1, *grid_of(meta)] for meta in items.metas])
        values, at, item = items.values, 0, 0
        for n in text.packing.lengths:
            ids, labels = text.ids[at : at + n], text.labels[at : at + n]
            at += n
            given: dict[str, Tensor] = {}
            kinds = (ids == IDS["image"]).int()
            count, left = 0, int(kinds.sum())
            while left:
                left -= int(grids[item + count].prod()) // MERGE**2
                count += 1
            if count:
                own = grids[item : item + count]
                patches = int(own.prod(1).sum())
                given = {"pixel_values": values[:patches], "image_grid_thw": own}
                values, item = values[patches:], item + count
            with Widened():
                logits = theirs(input_ids=ids[None], mm_token_type_ids=kinds[None], **given).logits[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / found["per"]


def grid_of(meta: Mapping[str, int]) -> tuple[int, int]:
    """Patches of a picture, whose sides are whole blocks of them already but for its area."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = smart_resize(meta["height"], meta["width"], factor=8, min_pixels=64, max_pixels=400)
    return height // 4, width // 4


def by_their_names(raw: Mapping[str, Any], grads: Mapping[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """Our gradients under the names of transformers' parameters."""
    text = {k.removeprefix("llm."): g for k, g in grads.items() if k.startswith("llm.")}
    tower = {k.removeprefix("vision.encoder."): g for k, g in grads.items() if k.startswith("vision.")}
    out = {t.key.replace("model.", "model.language_model."): join(t, text) for t in checkpoint_tensors(cfg)}
    opened = open_folder(raw["model"]["vision"]["weights"])
    return out | {f"model.{t.key}": join(t, tower) for t in opened.tensors}


@pytest.mark.parametrize("name", on_demand(NAMES, ["qwen2_5_vl"]))
def test_loss_and_gradients_are_those_of_transformers(name: str, tmp_path: Path, alone: Any) -> None:
    from llm.hf import load_hf

    theirs, raw = made(name, tmp_path, 1)
    (found,) = alone(1, first_gradients, raw)
    loss = their_loss(theirs, found)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-10)
    loss.backward()
    ours = by_their_names(raw, found["grads"], load_hf(raw["model"]["llm"]["preset"]).model.cfg)
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys()
    most = max(float(g.abs().max()) for g in wanted.values())
    far = {n: float((ours[n] - g.reshape(ours[n].shape)).abs().max()) for n, g in wanted.items()}
    # Gradients of the table of positions are rounded to float32 in transformers.
    assert not {n: x for n, x in far.items() if x > (1e-6 if "pos_embed" in n else 1e-9) * most}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"vision": {"ranks": "0-1"}, "llm": {"tp": 2, "ranks": "0-1", "sequence_parallel": True}},
    "cp": {"vision": {"ranks": "0-1", "cp": 2}, "llm": {"cp": 2, "ranks": "0-1"}},
    "pp": {"vision": {"ranks": "0-1"}, "llm": {"pp": 2, "ranks": "0-1"}},
    "apart": {"vision": {"ranks": "0", "cp": 1}, "llm": {"ranks": "1-2", "cp": 2}},
    "pp, tp": {"vision": {"ranks": "0-3"}, "llm": {"pp": 2, "tp": 2}},
    "cp, pp": {"vision": {"pp": 2, "ranks": "2-3"}, "llm": {"pp": 2, "cp": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_learns_alike(name: str, tmp_path: Path, ranks: Any) -> None:
    _, raw = made(name, tmp_path, 1)
    raw["model"]["llm"] |= {"mtp_layers": 1, "mtp_pattern": "*-"}
    raw["schedule"] = {"microbatches": 2}
    expected = ranks(1, trained, raw, 2)[0]
    assert min(expected[0]["grad_norm_by_module"].values()) > 0
    for way, layout in LAYOUTS.items():
        world = 1 + max(int(str(m.get("ranks", "0-3"))[-1]) for m in layout.values())
        for steps in ranks(world, trained, {**raw, "layout": layout}, 2):
            assert largest_difference(steps, expected) < 1e-9, way


def trained(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Metrics of the first steps, from initial weights of the language model: it has one more block."""
    with running(raw) as (job, feed):
        fill_encoders(job)
        return [asdict(train_step(job, feed, step)) for step in range(steps)]
