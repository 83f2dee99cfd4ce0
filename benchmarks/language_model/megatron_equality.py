"""Holds multi-token prediction, routing and its objectives against megatron-core's, in float64 on a CPU.

    PYTHONPATH=peers/megatron python -m benchmarks.language_model.megatron_equality

One JSON line a check, with the greatest difference of its random cases, relative to the largest value;
exits with 1 where one is above the tolerance. Whole models of both are built with the same weights
(attention, dense and expert layers, latent or not; its Mamba-2 needs a GPU) and run on the same documents, as
a batch of equal lengths and packed. Where definitions differ the cases are chosen so that they meet, with a
word why; docs/llm.md, "Compared with megatron-core", lists them.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.language_model import megatron_peer as peer
from llm.balance import choose, document_loads, sequence_loss, z_loss
from llm.checks import check
from llm.config import LLMConfig
from llm.counts import Counts
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext, MoE
from llm.mtp import IGNORE, ahead
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.routing import plan_route
from parallel.published import module_tensors
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes, Axis
from tests.llm.widened import Widened

TOLERANCE = 1e-12
Differences = dict[str, float]


def far(ours: Tensor, theirs: Tensor) -> float:
    """Greatest difference, relative to the largest of theirs."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lengths_of(r: random.Random, most: int) -> list[int]:
    return [r.choice([1, 2, 3, 9, 17]) for _ in range(r.randint(1, most))]


def telling_moe(cfg: LLMConfig, bias: Tensor) -> MoE:
    """One whose input is logits [n, E] with a 1 behind them, whose output is the routing weights [n, E]."""
    e = cfg.n_experts
    moe = MoE(cfg, Axes(), device=None, dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(e, e + 1))
        moe.experts.up.zero_()[:, 0, e] = 1.0
        moe.experts.down.copy_(torch.eye(e, e + 1).unsqueeze(-1))
    moe.expert_bias.copy_(bias)
    return moe


def routing(r: random.Random) -> Differences:
    """Who is chosen and with what weight; sigmoid and softmax, with bias, groups and scale."""
    router = r.choice(["sigmoid", "softmax"])
    groups, best = r.choice([(1, 1), (2, 1), (4, 2), (4, 3), (8, 4)])
    size = r.choice([2, 4])
    # Its groups are chosen by their top_k // top_groups best, ours by two, as the published code has it.
    k = 2 * best if groups > 1 else r.randint(2, 8)
    e = groups * size if groups > 1 else r.randint(k, 64)
    # After a softmax over the chosen its groups are chosen by logits: only compared before it.
    before = router == "softmax" and (groups > 1 or r.random() < 0.5)
    cfg = LLMConfig(
        pattern="E", d_model=e + 1, n_experts=e, top_k=k, expert_ffn=1, shared_ffn=0, router=router,
        norm_top_k=not before, routed_scale=r.choice([1.0, 2.5]), expert_groups=groups, top_groups=best,
    )  # fmt: skip
    check(cfg)
    n = r.randint(1, 40)
    logits = randn(n, e).mul(2.0).requires_grad_()
    # It has no bias with softmax.
    bias = 0.5 * randn(e) if router == "sigmoid" else torch.zeros(e, dtype=torch.float64)
    x = torch.cat([logits, torch.ones(n, 1, dtype=torch.float64)], 1)
    ours = telling_moe(cfg, bias)(x, ForwardContext(Packing.of([n]), n))[:, :e]
    with Widened():
        theirs, _ = peer.moe_utils.topk_routing_with_score_function(
            logits,
            k,
            use_pre_softmax=before,
            num_groups=groups if groups > 1 else None,
            group_topk=best if groups > 1 else None,
            scaling_factor=cfg.routed_scale,
            score_function=router,
            expert_bias=bias if router == "sigmoid" else None,
        )
    weight = randn(n, e)
    mine, its = (torch.autograd.grad((y * weight).sum(), logits)[0] for y in (ours, theirs))
    return {"weights": far(ours, theirs), "gradient": far(mine, its)}


def objectives(r: random.Random) -> Differences:
    """The balance loss of each document and the z-loss, with their gradients."""
    e = r.randint(2, 64)
    k, lengths = r.randint(1, e - 1), lengths_of(r, 5)  # the balance of all experts has no gradient but noise
    n, router = sum(lengths), r.choice(["sigmoid", "softmax"])
    logits = randn(n, e).requires_grad_()
    score = torch.sigmoid(logits) if router == "sigmoid" else torch.softmax(logits, -1)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    loads = document_loads(choose(score.detach(), k), document, len(lengths), e, [])
    ours = [sequence_loss(score / (score.sum(-1, keepdim=True) + 1e-20), loads, document), z_loss(logits)]
    with Widened():
        chosen, share = peer.moe_utils.compute_routing_scores_for_aux_loss(logits, k, router)
        parts = zip(share.split(lengths), chosen.split(lengths), lengths, strict=True)
        # Its loss of a sequence is a mean over tokens, ours their sum, to be divided by all of the step.
        balance = [
            t * peer.moe_utils.switch_load_balancing_loss_func(p, c.sum(0), t, k, e, 1.0) for p, c, t in parts
        ]
        theirs = [torch.stack(balance).sum(), n * peer.moe_utils.z_loss_func(logits, 1.0)]
    out = {}
    for name, a, b in zip(("balance", "z"), ours, theirs, strict=True):
        mine, its = (torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (a, b))
        out |= {name: far(a, b), f"{name}_gradient": far(mine, its)}
    return out


def bias_update(r: random.Random) -> Differences:
    """The selection bias after a global batch."""
    e = r.randint(2, 64)
    cfg = LLMConfig(
        pattern="E", d_model=e + 1, n_experts=e, top_k=1, expert_ffn=1, shared_ffn=0,
        expert_bias_rate=r.choice([1e-3, 0.25]),
    )  # fmt: skip
    load, bias = torch.randint(0, 5, (e,)), randn(e)
    moe = telling_moe(cfg, bias)
    moe.update_bias(load)
    group = torch.distributed.group.WORLD
    theirs = peer.moe_utils.get_updated_expert_bias(load.double(), bias, cfg.expert_bias_rate, group)
    return {"bias": far(moe.expert_bias, theirs)}


def permutation(r: random.Random) -> Differences:
    """Rows in the order of their experts, and back with weights."""
    e, width = r.randint(1, 16), r.randint(1, 8)
    n, k = r.randint(1, 40), r.randint(1, e)
    chosen = torch.rand(n, e).argsort(1)[:, :k]
    hit = torch.zeros(n, e, dtype=torch.bool).scatter_(1, chosen, True)
    results = []
    x, weight = randn(n, width).requires_grad_(), randn(n, k).requires_grad_()
    cotangent, factor = randn(n, width), randn(n * k, 1)
    for own in (True, False):
        if own:
            route = plan_route(chosen, e, Axis.single("ep"))
            rows = dispatch(x, route)
            y = combine(rows * factor, weight, route)
        else:
            dense = torch.zeros(n, e, dtype=torch.float64).scatter(1, chosen, weight)
            rows, _, order, _, _ = peer.moe_utils.permute(x, hit, num_out_tokens=n * k)
            y = peer.moe_utils.unpermute(rows * factor, order, x.shape, dense, hit)
        results.append([rows, y, *torch.autograd.grad((y * cotangent).sum(), (x, weight))])
    names = ("rows", "combined", "row_gradient", "weight_gradient")
    return {name: far(a, b) for name, a, b in zip(names, *results, strict=True)}


def rolled(r: random.Random) -> Differences:
    """Tokens and labels ahead, in their documents."""
    lengths, depths = lengths_of(r, 6), r.randint(1, 4)
    ids, labels = torch.randint(1, 50, (2, sum(lengths)))
    labels[torch.rand(len(labels)) < 0.3] = IGNORE
    mtp = ahead(ids, labels, Packing.of(lengths), depths)
    params, wrong = peer.packed(lengths), 0
    a, b, mask = ids[None], labels[None], (labels != IGNORE)[None].long()
    for depth in range(depths):
        a, b, mask = (peer.mtp.roll_tensor(t, packed_seq_params=params)[0] for t in (a, b, mask))
        wanted = torch.where(mask == 0, IGNORE, b)
        wrong += int((mtp[0][depth] != a[0]).sum() + (mtp[1][depth] != wanted[0]).sum())
    return {"tokens": float(wrong)}


def random_model(r: random.Random) -> LLMConfig:
    """Any model of attention, dense and expert layers with multi-token prediction."""
    kv = r.choice([1, 2, 4])
    return LLMConfig(
        pattern="".join(r.choices("*-E", k=r.randint(1, 3))),
        d_model=12,
        vocab_size=29,
        n_heads=kv * r.choice([1, 3]),
        n_kv_heads=kv,
        head_dim=r.choice([4, 6]),
        n_experts=8,
        top_k=4,
        expert_ffn=10,
        shared_ffn=r.choice([0, 14]),
        latent=r.choice([None, 6]),
        routed_scale=r.choice([1.0, 2.5]),
        expert_groups=(groups := r.choice([1, 4])),
        top_groups=min(groups, 2),
        mlp_ffn=18,
        mlp_gated=r.random() < 0.3,
        activation=r.choice(["relu2", "silu"]),
        mtp_layers=r.randint(1, 3),
        mtp_pattern=r.choice(["*E", "-", "E*", "*"]),
        mtp_weight=r.choice([0.3, 1.0]),
        tied=r.random() < 0.3,
        init_std=0.3,
        loss_chunk=7,
        z_weight=r.choice([0.0, 0.2]),
    )


def our_model(cfg: LLMConfig) -> LLM:
    """Random weights, none at a special value that could hide a mistake."""
    model = LLM(cfg, dtype=torch.float64)
    initialise(model, random.randrange(1 << 20), "llm")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def hear(module: nn.Module) -> list[Tensor]:
    """What a module gives from now on."""
    heard: list[Tensor] = []
    module.register_forward_hook(lambda _, args, out: heard.append(out.detach()))
    return heard


@dataclass(frozen=True)
class Task:
    """One micro-batch for both models.

    labels: of every token; counts [T]: where they count; known, at_depths: labels with IGNORE elsewhere, of
    the next token [T] and of each depth [D, T].
    """

    cfg: LLMConfig
    lengths: list[int]
    packed: bool
    ids: Tensor
    labels: Tensor
    counts: Tensor
    known: Tensor
    at_depths: Tensor

    @property
    def scale(self) -> float:
        """What the summed loss is multiplied by."""
        return 1.0 / int(self.counts.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """Of its batch, [sequences, length]; packed it is one sequence."""
        return (1, len(self.ids)) if self.packed else (len(self.lengths), self.lengths[0])

    def sequence_first(self, x: Tensor) -> Tensor:
        """Its hidden states in our order of tokens."""
        return x.flatten(0, 1) if self.packed else x.transpose(0, 1).flatten(0, 1)


def random_task(r: random.Random, packed: bool) -> Task:
    cfg = random_model(r)
    if not packed and r.random() < 0.7:  # its balance loss takes a packed stream for one sequence
        cfg = replace(cfg, aux_weight=0.3)
    lengths = [*lengths_of(r, 5), 9] if packed else [r.choice([9, 14])] * r.randint(1, 3)
    ids, labels = torch.randint(0, cfg.vocab_size, (2, sum(lengths)))
    # Each depth has a label, which its mean needs there.
    counts = (torch.rand(len(ids)) < 0.7) | (positions(lengths) == cfg.mtp_layers)
    known = torch.where(counts, labels, IGNORE)
    _, at_depths = ahead(ids, known, Packing.of(lengths), cfg.mtp_layers)
    return Task(cfg, lengths, packed, ids, labels=labels, counts=counts, known=known, at_depths=at_depths)


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def step_of_ours(ours: LLM, task: Task) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss of each token, and the mean over depths of multi-token prediction."""
    n = len(task.ids)
    means = Counts(n, tuple((task.at_depths != IGNORE).sum(1).tolist()))
    loss = ours(LLMBatch(task.ids, task.known, Packing.of(task.lengths), n, {}, means), {})
    (loss.sum() * task.scale).backward()
    return loss, ours.take_objectives()["mtp"]


def step_of_theirs(theirs: Any, task: Task) -> tuple[Tensor, Tensor]:
    """The same of megatron-core's model."""
    losses: list[Tensor] = []
    compute = theirs.compute_language_model_loss
    theirs.compute_language_model_loss = lambda *a: losses.append(compute(*a)) or losses[-1]
    peer.aux_scale(routed=1.0 / len(task.ids), mtp_scale=task.scale)
    with Widened():
        loss = theirs(
            task.ids.view(task.shape),
            positions(task.lengths).view(task.shape),
            None,
            labels=task.labels.view(task.shape),
            loss_mask=task.counts.view(task.shape).double(),
            packed_seq_params=peer.packed(task.lengths) if task.packed else None,
        )
        loss = loss.view(-1) * task.counts
        (loss.sum() * task.scale).backward()
    assert len(losses) == task.cfg.mtp_layers + 1
    depths = zip(losses, task.at_depths, strict=False)
    return loss, torch.stack([one.detach().view(-1)[known != IGNORE].mean() for one, known in depths]).mean()


def whole_model(r: random.Random, packed: bool) -> Differences:
    """Losses of all depths, their hidden states, and every gradient of a whole model; of a step of one
    micro-batch, since its depths are means over each micro-batch, ours over the step."""
    task = random_task(r, packed)
    ours = our_model(task.cfg)
    for moe in ours.moe_layers():
        moe.expert_bias.copy_(0.2 * torch.randn(task.cfg.n_experts))
    theirs = peer.build(task.cfg, peer.translate(task.cfg, module_tensors(ours)))
    assert ours.mtp is not None
    heard = hear(ours.mtp), hear(theirs.mtp.layers[0].final_layernorm)
    loss, mtp_mean = step_of_ours(ours, task)
    its, its_mtp = step_of_theirs(theirs, task)
    gradients = {name: p.grad for name, p, _ in declared(ours) if p.grad is not None}
    mine = peer.translate(task.cfg, gradients)
    known = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # Experts without a token have no gradient there, and zeros here.
    assert known.keys() <= mine.keys(), known.keys() - mine.keys()
    assert not any(mine[name].any() for name in mine.keys() - known.keys())
    states = max(far(a, task.sequence_first(b)) for a, b in zip(*heard, strict=True))
    return {
        "loss": far(loss.detach(), its.detach()),
        "mtp_loss": far(mtp_mean, its_mtp),
        "mtp_states": states,
        "gradients": max(far(mine[name], g) for name, g in known.items()),
    }


CHECKS: dict[str, tuple[Callable[[random.Random], Differences], int]] = {
    "rolled tokens and labels": (rolled, 100),
    "routing": (routing, 200),
    "balance and z-loss": (objectives, 200),
    "bias update": (bias_update, 100),
    "permutation": (permutation, 100),
    "model, batch": (lambda r: whole_model(r, False), 30),
    "model, packed": (lambda r: whole_model(r, True), 30),
}


def run(seed: int, share: float) -> Iterator[dict[str, Any]]:
    """The worst difference of each check over its random cases, as its line."""
    for name, (one, cases) in CHECKS.items():
        worst: Differences = {}
        count = max(1, round(cases * share))
        for case in range(count):
            r = random.Random(f"{seed} {name} {case}")
            torch.manual_seed(r.randrange(1 << 30))
            for key, value in one(r).items():
                worst[key] = max(worst.get(key, 0.0), value)
        passed = all(v <= TOLERANCE for v in worst.values())
        yield {"check": name, "cases": count, "worst": worst, "passed": passed}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, at least one each")
    args = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as folder, peer.started(f"{folder}/store") as version:
        print(json.dumps({"megatron-core": version, "torch": torch.__version__, "tolerance": TOLERANCE}))
        for line in run(args.seed, args.share):
            print(json.dumps(line), flush=True)
            passed = passed and line["passed"]
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
