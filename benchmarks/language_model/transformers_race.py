"""Races the language model against transformers' Nemotron-H: tokens a second, forward and backward, on a CPU.

    python -m benchmarks.language_model.transformers_race    # the race, and how the scan grows
    python -m benchmarks.language_model.transformers_race --only small --rounds 9

Both have the same weights, by way of a published checkpoint, and the same tokens. Losses and gradients are
compared first, then rounds are interleaved and medians compared. transformers runs with what it chooses
itself for attention and experts (scaled_dot_product_attention, grouped products). Seconds are those of the
process on its processors, so that a shared machine disturbs little; with one thread, the default, they are
the time that an idle machine would take. Needs the test extra.

most: the ratio if our matrix products and attention kernels, run again alone on their own operands, were all
that a step took. It bounds what any other code around the same products could reach.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from encoders import compat
from llm.hf import load_hf
from llm.model import LLMBatch
from llm.scan import ScanInputs, scan
from parallel.sequence.packed import Packing
from tests.llm.oracle import SIZES as TOY  # widths of a test: operator dispatch is all that takes time


@dataclass(frozen=True)
class Size:
    """Nemotron 3 Nano's widths divided by `scale`, a pattern of layers, and `batch` documents of `length`.
    other: fields of config.json that are not so."""

    pattern: str
    scale: int
    batch: int
    length: int
    other: Mapping[str, int] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Fields of config.json. Head dims, state, chunk and choices a token are those of the full model."""
        s = self.scale
        return {
            "hybrid_override_pattern": self.pattern,
            "vocab_size": 2048,
            "hidden_size": 2688 // s,
            "num_attention_heads": 32 // s,
            "num_key_value_heads": 32 // s // 2,
            "head_dim": 128,
            "intermediate_size": 4 * 2688 // s,
            "ssm_state_size": 128,
            "mamba_num_heads": 64 // s,
            "mamba_head_dim": 64,
            "n_groups": max(1, 8 // s),
            "chunk_size": 128,
            "n_routed_experts": 32,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856 // s,
            "moe_shared_expert_intermediate_size": 3712 // s,
            "routed_scaling_factor": 2.5,
            **self.other,
        }


SIZES = {
    "toy": Size("MEM*EM-E", 1, 2, 128, TOY),
    "tiny": Size("MEM*E", 16, 1, 512),
    "small": Size("MEMEM*E", 8, 1, 1024),
    "long": Size("MEM*E", 16, 1, 8192),
    "mamba": Size("MMM", 8, 1, 2048),
    "experts": Size("EEE", 8, 1, 1024),
    "attention": Size("***", 8, 1, 2048),
}


def parties(size: Size, folder: Path) -> tuple[Any, Any, Tensor]:
    """transformers' model, ours from its files, and ids [batch, length]."""
    # transformers imports both packages, whose native parts a CPU torch cannot load.
    compat.torchvision()
    compat.torchaudio()
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    theirs = NemotronHForCausalLM(NemotronHConfig(**size.config())).train()
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            # Its mixer clamps time steps at config.time_step_min; published models were trained without.
            module.time_step_limit = (0.0, float("inf"))
    theirs.save_pretrained(folder)
    ids = torch.randint(0, size.config()["vocab_size"], (size.batch, size.length))
    return theirs, load_hf(folder).model, ids


def race(size: Size, rounds: int) -> dict[str, Any]:
    """Tokens a second of both, from medians, their ratio, and the greatest differences in value."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, ids = parties(size, Path(folder))
    count = size.batch * (size.length - 1)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).reshape(-1)
    packing = Packing.of([size.length] * size.batch)
    batch = LLMBatch(ids.reshape(-1), labels, packing, ids.numel(), {})

    def run_theirs() -> Tensor:
        loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def run_ours() -> Tensor:
        loss = ours(batch, {}).sum() / count
        loss.backward()
        return loss.detach()

    found = {"loss": abs(float(run_ours() / run_theirs()) - 1.0)}
    pairs = [(theirs.model.embeddings.weight, ours.embed.weight), (theirs.lm_head.weight, ours.head)]
    for name, (a, b) in zip(("embedding", "head"), pairs, strict=True):
        found[name] = float((a.grad - b.grad).abs().max() / a.grad.abs().max())
    if not max(found.values()) < 1e-4:
        raise SystemExit(f"unequal numerics, the race would mean nothing: {found}")
    with Products() as products:
        run_ours()
    times = interleave([run_theirs, run_ours, products.again], [theirs, ours, ours], rounds)
    medians = [statistics.median(t) for t in times]
    tokens = ids.numel()
    return {
        "tokens": tokens,
        "theirs_tokens_per_s": round(tokens / medians[0]),
        "ours_tokens_per_s": round(tokens / medians[1]),
        "ratio": round(medians[0] / medians[1], 2),
        "ratio_of_minima": round(min(times[0]) / min(times[1]), 2),
        "most": round(medians[0] / medians[2], 2),
        "relative_difference": found,
    }


class Products(TorchDispatchMode):
    """Records the matrix products and attention kernels that run inside it."""

    NAMES = frozenset(
        {
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
            "_grouped_mm",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in self.NAMES:
            self.calls.append(partial(func, *args, **kwargs))
        return func(*args, **kwargs)

    @torch.no_grad()
    def again(self) -> None:
        for call in self.calls:
            call()


def interleave(
    runs: Sequence[Callable[[], object]], models: Sequence[torch.nn.Module], rounds: int
) -> list[list[float]]:
    """Seconds of each run in each round, one after another within it, after one round that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for r in range(rounds + 1):
        for i, (run, model) in enumerate(zip(runs, models, strict=True)):
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            run()
            if r:
                times[i].append(time.process_time() - start)
    return times


def scan_growth(lengths: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Seconds of one scan, forward and backward, at each length, and microseconds a token."""
    heads, width, groups, state = 8, 32, 2, 64
    out = []
    for n in lengths:
        x, dt = torch.randn(n, heads, width), torch.rand(n, heads) * 0.1
        b, c = torch.randn(n, groups, state), torch.randn(n, groups, state)
        leaves = [t.requires_grad_() for t in (x, dt, b, c)]
        inputs = ScanInputs(x=x, dt=dt, a=-torch.rand(heads) - 0.5, b=b, c=c)
        document = torch.zeros(n, dtype=torch.int64)
        seconds = []
        for _ in range(rounds + 1):
            start = time.process_time()
            torch.autograd.grad(scan(inputs, document, 128).sum(), leaves)
            seconds.append(time.process_time() - start)
        median = statistics.median(seconds[1:])
        out.append({"tokens": n, "seconds": round(median, 4), "us_per_token": round(1e6 * median / n, 2)})
    return out


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", choices=[*SIZES, "scan"], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = args.only or [*SIZES, "scan"]
    for name in wanted:
        if name != "scan":
            print(
                json.dumps({"size": name, "threads": args.threads, **race(SIZES[name], args.rounds)}),
                flush=True,
            )
    if "scan" in wanted:
        for line in scan_growth([1 << k for k in range(10, 16)], min(args.rounds, 5)):
            print(json.dumps({"scan": line}), flush=True)


if __name__ == "__main__":
    main()
