"""The whole job once more in straight lines of plain torch, for the real one to equal.

No index, plan, packing, boundary, schedule, mesh or optimizer of the project: samples are read with tarfile
and json, and go one at a time through the modules' own forwards, in one process. Tokens, labels, losses,
clipping, AdamW and its rate are written out here.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import wave
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import encoders
from encoders.contract import ItemBatch
from encoders.module import build_encoder_module
from llm.config import LLMConfig
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from parallel.sequence.packed import Packing
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes

BEGIN, END, PLACE, VOCAB = 256, 257, 259, 264  # bytes are tokens 0-255
Sample = Mapping[str, bytes]  # its files by name


def read(patterns: Sequence[str]) -> list[tuple[str, Sample]]:
    """(data set, sample) of all shards in order: KEY.NAME in NAME-NUMBER.tar is a file of the sample KEY."""
    found: dict[tuple[Path, str], dict[str, bytes]] = {}
    for shard in (p for pattern in patterns for p in sorted(Path(pattern).parent.glob(Path(pattern).name))):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, name = member.name.split(".", 1)
                found.setdefault((shard, key), {})[name] = tar.extractfile(member).read()  # type: ignore
    return [(shard.name.rpartition("-")[0], files) for (shard, _), files in found.items()]


def sizes(payload: bytes) -> dict[str, int]:
    """The metadata of a picture or a clip, as an encoder gets it."""
    if payload.startswith(b"RIFF"):
        with wave.open(io.BytesIO(payload)) as clip:
            return {"samples": clip.getnframes(), "rate": clip.getframerate()}
    width, height = Image.open(io.BytesIO(payload)).size
    return {"height": height, "width": width}


def build(raw: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Encoders with projectors and the language model, whole, in float64, with their initial weights."""
    nets: dict[str, nn.Module] = {}
    llm = LLMConfig(**{"vocab_size": VOCAB, **raw["model"]["llm"]})
    for name, section in raw["model"].items():
        if name == "llm":
            nets[name] = LLM(llm, dtype=torch.float64)
        else:
            cls, hidden = encoders.resolve(section["encoder"]), section["projector"]["hidden"]
            kw: dict[str, Any] = {"d_out": llm.d_model, "projector_hidden": hidden, "dtype": torch.float64}
            nets[name] = build_encoder_module(cls, cls.Config(**section["options"]), axes=Axes(), **kw)
        initialise(nets[name], raw["run"]["seed"], name)
    return nets


def sequence(sample: Sample, nets: Mapping[str, Any]) -> tuple[list[int], list[int], dict[str, Any]]:
    """ids and labels of a sample, and by module the positions and rows of its items.

    A begin marker, the bytes of texts and a placeholder for each row of items as they follow, an end marker.
    The label of a token is the next token where that is learned: texts without "loss": false, the end marker.
    """
    ids, learned = [BEGIN], [False]
    entering: dict[str, tuple[list[int], list[Tensor]]] = {}
    for segment in json.loads(sample["json"])["segments"]:
        if "text" in segment:
            new, learn = list(segment["text"].encode()), segment.get("loss", True)
        else:
            (module, file), *_ = ((m, segment[m]) for m in nets if m in segment)
            encoder, meta = nets[module].encoder, sizes(sample[file])
            values = encoder.prepare(encoder.cfg, sample[file], meta).double()
            rows = nets[module](ItemBatch(values, (len(values),), (meta,))).values
            positions, held = entering.setdefault(module, ([], []))
            positions += range(len(ids), len(ids) + len(rows))
            held.append(rows)
            new, learn = [PLACE] * len(rows), False
        ids, learned = ids + new, learned + [learn] * len(new)
    ids, learned = [*ids, END], [*learned, True]
    labels = [n if learn else -100 for n, learn in zip(ids[1:], learned[1:], strict=True)]
    return ids, [*labels, -100], entering


def cross_entropy(states: Tensor, head: Tensor, labels: Sequence[int]) -> Tensor:
    """Sum over the labels that are tokens."""
    return F.cross_entropy(states @ head.T, torch.tensor(labels), ignore_index=-100, reduction="sum")


@dataclass(frozen=True)
class Counts:
    """What a step's sums are divided by: all tokens, labels, and labels at each depth of MTP."""

    tokens: int
    next: int
    mtp: tuple[int, ...] = ()


class Language:
    """The language model on one sample, and what its routers thought of it.

    totals: means over the step's samples as they come, unweighted: next (token), balance, z, mtp.
    """

    def __init__(self, model: LLM) -> None:
        self.model, self.states, self.routed = model.eval(), torch.empty(0), {}
        assert model.norm is not None
        model.norm.register_forward_hook(lambda *seen: setattr(self, "states", seen[2]))
        for layer in model.moe_layers():
            layer.router.register_forward_hook(lambda router, x, out: self.routed[router].append(out))
        self.reset()

    def reset(self) -> None:
        self.totals = dict.fromkeys(("next", "balance", "z", "mtp"), 0.0)
        self.load = {
            layer: torch.zeros(self.model.cfg.n_experts).double() for layer in self.model.moe_layers()
        }

    def learn(self, ids: list[int], labels: list[int], entering: dict[str, Any], per: Counts) -> None:
        """Add a sample's gradients. per: what its sums are divided by."""
        cfg, n = self.model.cfg, len(ids)
        self.routed = {layer.router: [] for layer in self.model.moe_layers()}
        packing = Packing.of([n])
        positions = {m: torch.tensor(at) for m, (at, _) in entering.items()}
        rows = {m: torch.cat(held) for m, (_, held) in entering.items()}
        self.model(LLMBatch(torch.tensor(ids), torch.tensor(labels), packing, n, positions), rows)
        head, states = self.model.head_weight(), self.states
        found = dict.fromkeys(self.totals, torch.zeros(()).double())
        found["next"] = cross_entropy(states, head, labels) / per.next
        for k in range(1, cfg.mtp_layers + 1):
            # Token i is given token i + k and predicts the one after it, as far as there is one.
            embedded = self.model.embed_ids(torch.tensor((ids[k:] + [0] * n)[:n]))
            states = self.model.mtp(states, embedded, ForwardContext(packing, n))  # type: ignore[misc]
            loss = cross_entropy(states, head, (labels[k:] + [-100] * n)[:n]) / per.mtp[k - 1]
            found["mtp"] = found["mtp"] + loss / cfg.mtp_layers
        for layer in self.model.moe_layers():
            for logits in self.routed[layer.router]:
                score = logits.sigmoid()
                fraction = score / score.sum(-1, keepdim=True)
                best = score.topk(cfg.top_k).indices.flatten().bincount(minlength=cfg.n_experts).double()
                frequency = best * cfg.n_experts / (cfg.top_k * n)
                found["balance"] = found["balance"] + (frequency * fraction.mean(0)).sum() * n / per.tokens
                found["z"] = found["z"] + logits.logsumexp(-1).square().sum() / per.tokens
                taken = (score + layer.expert_bias).topk(cfg.top_k).indices
                self.load[layer] += taken.flatten().bincount(minlength=cfg.n_experts)
        weights = {"next": 1.0, "balance": cfg.aux_weight, "z": cfg.z_weight, "mtp": cfg.mtp_weight}
        sum(weights[k] * found[k] for k in found).backward()  # type: ignore[union-attr]
        self.totals = {k: self.totals[k] + float(found[k].detach()) for k in found}

    @torch.no_grad()
    def rebalance(self) -> None:
        """Routing moves towards the experts that got less than the mean of the batch."""
        for layer, load in self.load.items():
            layer.expert_bias += self.model.cfg.expert_bias_rate * (load.mean() - load).sign()


def rate(train: Mapping[str, Any], step: int) -> float:
    """Up to lr over the first steps, then constant, then down in equal steps that would meet min_lr."""
    n, low, high = train["steps"], train["min_lr"], train["lr"]
    rising, falling = round(train["warmup"] * n), round(train["decay"] * n)
    if step < rising:
        return high * (step + 1) / rising
    into = step - (n - falling) + 1
    return high - (high - low) * max(0, into) / (falling + 1)


@torch.no_grad()
def adamw(p: Tensor, state: dict[str, Any], lr: float, train: Mapping[str, Any]) -> None:
    """Loshchilov and Hutter, arXiv 1711.05101; matrices decay, vectors do not."""
    (b1, b2), g = train["betas"], p.grad
    assert g is not None
    state["t"] = state.get("t", 0) + 1
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    m, v = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
    p *= 1 - lr * (train["weight_decay"] if p.ndim > 1 else 0.0)
    p -= lr * m / (v.sqrt() + train["eps"])


def counts(batch: Sequence[tuple[list[int], list[int], Any]], depths: int) -> Counts:
    learned = [sum(label >= 0 for _, labels, _ in batch for label in labels[k:]) for k in range(depths + 1)]
    return Counts(sum(len(ids) for ids, _, _ in batch), learned[0], tuple(learned[1:]))


def mixed(x: int) -> int:
    """SplitMix64's hash of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def drawn(seed: int, n: int, position: int) -> int:
    """The sample at a position of a run over n samples: every epoch is a shuffle of its own (a Feistel
    network over numbers of two digits, applied until it gives one below n)."""
    source = int.from_bytes(hashlib.blake2b(repr((seed, "")).encode(), digest_size=8).digest(), "little")
    key = mixed(mixed(position // n) ^ source)
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b, x = -(-n // (2 * a)) * 2, n
    found = position % n
    while x >= n:
        low, high = found % a, found // a
        for turn in range(0, 24, 2):
            low = (low + mixed(high ^ mixed((key + turn) % 2**64)) % a) % a
            high = (high + mixed(low ^ mixed((key + turn + 1) % 2**64)) % b) % b
        x = found = low + a * high
    return x


def train(raw: Mapping[str, Any], steps: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(metrics of each step, final weights and routing biases by full name) of a config as a mapping."""
    options, samples, nets = raw["train"], read(raw["data"]["train"]), build(raw)
    language = Language(nets["llm"])  # type: ignore[arg-type]
    state: dict[Tensor, dict[str, Any]] = {}
    metrics = []
    for step in range(steps):
        at = np.arange(step * options["global_batch"], (step + 1) * options["global_batch"])
        ids = [drawn(raw["run"]["seed"], len(samples), int(k)) for k in at]
        batch = [sequence(samples[i][1], nets) for i in ids]
        per = counts(batch, language.model.cfg.mtp_layers)
        language.reset()
        losses: dict[str, dict[str, Counter[str]]] = {k: defaultdict(Counter) for k in ("modality", "source")}
        for i, one in zip(ids, batch, strict=True):
            before = language.totals["next"]
            language.learn(*one, per)
            modality = "+".join(m for m in nets if m in one[2]) or "text"
            for key, name in (("modality", modality), ("source", samples[i][0])):
                losses[key][name]["nats"] += (language.totals["next"] - before) * per.next  # type: ignore
                losses[key][name]["tokens"] += sum(label >= 0 for label in one[1])
        squares = {
            name: sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
            for name, net in nets.items()
        }
        norm, lr = math.sqrt(sum(squares.values())), rate(options, step)
        for p in (p for net in nets.values() for p in net.parameters() if p.grad is not None):
            p.grad *= min(1.0, options["clip"] / (norm + 1e-6)) if options["clip"] else 1.0  # type: ignore[operator]
            adamw(p, state.setdefault(p, {}), lr, options)
            p.grad = None
        language.rebalance()
        means = dict(language.totals)
        by_module = {name: math.sqrt(s) for name, s in squares.items()}
        metrics.append({"loss": means.pop("next"), "lr": lr, "grad_norm": norm, "objectives": means})
        metrics[-1] |= {"grad_norm_by_module": by_module, "tokens": per.tokens}
        for key, by in losses.items():
            means = {name: (n["nats"] / n["tokens"], n["tokens"]) for name, n in by.items() if n["tokens"]}
            metrics[-1][f"loss_by_{key}"] = means
    return metrics, {f"{m}.{k}": v for m, net in nets.items() for k, v in net.state_dict().items()}
