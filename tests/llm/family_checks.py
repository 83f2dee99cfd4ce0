"""What is held of every family of published models, for its tests and for the table of docs/families.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llm.config import LLMConfig
from llm.decode import Prompt, generate
from llm.hf import CausalLM, load_hf, load_weights, save_hf
from llm.hf.weights import checkpoint_tensors
from llm.model import LLM
from parallel.published import SafeFolder, join, module_tensors
from parallel.topology.stage import stages_of
from tests.llm.degrees import Degrees
from tests.llm.families import build, config_of, even, ids_of, loss, options, prepare, run, save
from tests.llm.folders import differing, read_all
from tests.llm.test_whole import Case
from tests.llm.widened import Widened

from transformers import AutoModelForCausalLM  # isort: skip


def far(ours: Tensor, theirs: Tensor, least: float = 1e-30) -> float:
    """Largest difference, relative to the largest element, or to `least`."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=least))


def hold_exact(name: str, seed: int, folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    """A random model: the logits of transformers' and ours on one batch, and the gradients of all weights."""
    theirs = build(config_of(name, options(name, seed)), dtype, seed)
    ours = load_hf(save(theirs, folder / "in"))
    ids = ids_of(theirs.config.vocab_size)
    expected, given = run(theirs, ids), ours(ids)
    assert given.dtype == expected.dtype
    assert far(given, expected) < tolerance, "logits"
    loss(expected, ids).backward()
    loss(given, ids).backward()
    known, mine = _their_gradients(theirs, folder / "grads"), _our_gradients(ours)
    assert mine.keys() == known.keys()
    # Some gradients are zero but for rounding, in both: those of a router with one expert a token, and of
    # biases of keys without positions. In float32 rounding is far above the tolerance of small ones.
    share = 1e-6 if dtype == torch.float64 else 1e-2
    least = share * max(float(g.abs().max()) for g in known.values())
    errors = {key: far(mine[key], g, least) for key, g in known.items()}
    assert not {key: e for key, e in errors.items() if not e < tolerance}


def _their_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Under published names: saved as weights are, by transformers' own code."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    saved = load_file(save(model, folder) / "model.safetensors")
    return {key: g for key, g in saved.items() if "e_score_correction_bias" not in key}


def _our_gradients(model: CausalLM) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    tensors = checkpoint_tensors(model.model.cfg)
    return {t.key: join(t, grads) for t in tensors if "e_score_correction_bias" not in t.key}


def hold_round_trip(name: str, seed: int, folder: Path) -> None:
    """A folder, in one file or several, read and written: the same bytes, and the same logits when
    transformers reads what was written."""
    theirs = build(config_of(name, options(name, seed)), torch.float32, seed)
    save(theirs, folder / "in", max_shard_size="20KB" if seed % 2 else "1GB")
    save_hf(load_hf(folder / "in").model, folder / "out", file_bytes=30_000)
    assert not differing(read_all(folder / "out"), read_all(folder / "in"))
    ids = ids_of(theirs.config.vocab_size)
    logits = [run(_loaded(folder / way), ids) for way in ("in", "out")]
    assert torch.equal(*logits)


def _loaded(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    return prepare(model)


def hold_generate(name: str, seed: int, folder: Path) -> None:
    """Greedy answers are those of transformers, longer than windows and than the context of training of long
    rotary positions."""
    theirs = build(config_of(name, options(name, seed)), seed=seed).eval()
    ours = load_hf(save(theirs, folder), dtype=torch.float64).model.eval()
    ids = ids_of(theirs.config.vocab_size, length=9)[:1]
    # Without its cache, which keeps all keys of a window of one token.
    how = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "use_cache": False}
    with Widened():
        expected = theirs.generate(ids, **how)
    assert generate(ours, [Prompt(ids[0])], 20)[0] == expected[0, 9:].tolist()


def even_folder(name: str, seed: int, folder: Path) -> LLMConfig:
    """A saved model of sizes that two ranks divide, and its config here."""
    theirs = build(config_of(name, even(name, seed)), torch.float32, seed)
    return load_hf(save(theirs, folder)).model.cfg


def cases(cfg: LLMConfig) -> dict[str, Case]:
    """A model over two ranks in each way, to be held against one process: losses and all gradients."""
    last = len(cfg.symbols) - 1
    return {
        "tp": Case(cfg, Degrees(2, tp=2, sp=True)),
        "cp": Case(cfg, Degrees(2, cp=2, order="zigzag")),
        "pp": Case(cfg, Degrees(2), edges=(1, last) if last > 1 else (1,)),
    }


def hold_stages(cfg: LLMConfig, folder: Path) -> None:
    """Pipeline stages that each read their own layers hold the whole model together."""
    whole = module_tensors(load_hf(folder).model)
    seen: dict[str, Tensor] = {}
    for stage in stages_of([0, 1, len(cfg.symbols)]):
        part = LLM(cfg, stage=stage)
        load_weights(part, SafeFolder(folder))
        seen |= module_tensors(part)
    assert not differing(seen, whole)
