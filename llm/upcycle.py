"""A dense model turned into a mixture of experts that computes the same function at the start.

Virtual-group initialisation (arXiv 2410.07524, section 3) splits the hidden features of a dense MLP into
`granularity` shards. Each expert is one shard, and consecutive experts are the shards of one copy, a virtual
group. The experts of a group share their router weights, so the router chooses whole groups, and the shards
of a group together are the dense MLP. Routing weights divide by the number of chosen experts; the weights of
experts are scaled up to compensate.

The paper's scales are approximate for activations that are not homogeneous. Here only weights that the output
is exactly homogeneous in are scaled, so the function is preserved to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from llm.checks import check
from llm.config import LLMConfig
from llm.model import LLM
from parallel.published import module_tensors
from parallel.sharding.param import declared, global_index, initial_values
from parallel.topology.layout import nearest


def upcycled_config(
    dense: LLMConfig,
    *,
    granularity: int,
    n_experts: int,
    top_k: int,
    shared_ffn: int = 0,
    routed_scale: float = 1.0,
    layers: Collection[int] | None = None,
) -> LLMConfig:
    """The mixture of experts that `dense` becomes: its - layers, or those in `layers`, become E layers.

    granularity: shards of each dense MLP. n_experts: of a layer, copies * granularity. top_k: experts that a
    token goes to, a multiple of granularity. shared_ffn: hidden width of a shared expert, whose output starts
    at zero. layers: indices of - layers, None for all. Raises ValueError where the numbers do not fit, and
    names the nearest that do.
    """
    wanted = {i for i, s in enumerate(dense.symbols) if s == "-"} if layers is None else set(layers)
    for i in sorted(wanted):
        if not 0 <= i < len(dense.symbols) or dense.symbols[i] != "-":
            raise ValueError(f"layer {i} of {dense.symbols!r} is no dense MLP; needed: indices of - layers")
    if not wanted:
        raise ValueError(f"{dense.symbols!r} has no dense MLP to upcycle; needed: a - layer")
    if "E" in dense.kinds:
        raise ValueError(
            f"{dense.symbols!r} has experts already, whose number would change; needed: a dense model"
        )
    if dense.activation == "clamped":
        raise ValueError("activation=clamped: its product is not linear in up, so experts cannot be scaled")
    if dense.mlp_bias:
        raise ValueError(
            "mlp_bias=True: experts have no biases to take a dense MLP's; needed: mlp_bias=False"
        )
    for what, n in (("mlp_ffn", dense.mlp_ffn), ("n_experts", n_experts), ("top_k", top_k)):
        if granularity < 1 or n % granularity:
            works = " or ".join(f"granularity={k}" for k in nearest(max(granularity, 1), n))
            raise ValueError(f"{what}={n} does not divide by granularity={granularity}; nearest: {works}")
    at = iter(range(len(dense.symbols)))
    pattern = "".join(s if s == "|" else "E" if next(at) in wanted else s for s in dense.pattern)
    cfg = replace(
        dense,
        pattern=pattern,
        n_experts=n_experts,
        top_k=top_k,
        expert_ffn=dense.mlp_ffn // granularity,
        shared_ffn=shared_ffn,
        routed_scale=routed_scale,
        latent=None,
        norm_top_k=True,
        expert_groups=1,
        top_groups=1,
    )
    check(cfg)
    return cfg


def upcycle(dense: LLM, cfg: LLMConfig, *, seed: int, name: str = "llm") -> LLM:
    """The unsharded model of `cfg`, from upcycled_config(), with the weights of the unsharded model `dense`.

    New weights (routers, shared experts) start as in a model called `name` with this `seed`.
    """
    given = module_tensors(dense)
    first = next(iter(dense.parameters()))
    model = LLM(cfg, device=first.device, dtype=first.dtype)
    value = upcycled(lambda n: given[n], dense.cfg, cfg, seed=seed, name=name)
    with torch.no_grad():
        for key, target in module_tensors(model).items():
            target.copy_(value(key))
    return model


def upcycled(
    fetch: Callable[[str], Tensor], dense: LLMConfig, cfg: LLMConfig, *, seed: int, name: str = "llm"
) -> Callable[[str], Tensor]:
    """A function from the name of a parameter or buffer of the mixture to its value.

    fetch gives those of the dense model by name. A checkpoint is thus converted parameter by parameter,
    without a whole model in memory.
    """
    meta = LLM(cfg, device="meta")
    specs = {key: (tuple(p.shape), spec.init) for key, p, spec in declared(meta)}
    copies = cfg.n_experts * cfg.expert_ffn // dense.mlp_ffn
    shards = cfg.n_experts // copies

    def fresh(key: str) -> Tensor:
        shape, init = specs[key]
        index = global_index(shape, [torch.arange(n) for n in shape])
        return initial_values(f"{name}.{key}", seed, init, index).view(shape)

    def value(key: str) -> Tensor:
        stem, _, leaf = key.partition(".mixer.")
        layer = stem.removeprefix("layers.")
        if not leaf or not layer.isdigit() or cfg.symbols[int(layer)] == dense.symbols[int(layer)]:
            return fetch(key)
        if leaf == "router.weight":
            return fresh(key)[:copies].repeat_interleave(shards, 0)
        if leaf == "expert_bias":
            return torch.zeros(cfg.n_experts)
        kind, _, part = leaf.removesuffix(".weight").partition(".")
        if kind == "shared":
            return torch.zeros(specs[key][0]) if part == "down" else fresh(key)
        whole = fetch(f"{stem}.mixer.{part}.weight")
        if part == "down":
            split = torch.unflatten(whole, 1, (shards, -1)).transpose(0, 1)
        else:
            split = torch.unflatten(whole, 0, (shards, -1))
        return (split * _scales(cfg, shards)[part]).repeat(copies, 1, 1)

    return value


def _scales(cfg: LLMConfig, shards: int) -> dict[str, float]:
    """Factor on each weight of an expert, so that the expert's output grows by shards / routed_scale.

    The routing weights of the chosen experts sum to routed_scale, and each shard of a group gets 1 / shards
    of its group's weight.
    """
    whole = shards / cfg.routed_scale
    if cfg.activation == "relu2":
        powers = {"gate": 2, "up": 1, "down": 1} if cfg.mlp_gated else {"up": 2, "down": 1}
    else:
        powers = {"up": 1, "down": 1} if cfg.mlp_gated else {"down": 1}
    each = whole ** (1.0 / sum(powers.values()))
    return {part: each if part in powers else 1.0 for part in ("gate", "up", "down")}
