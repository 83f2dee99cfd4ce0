"""megatron-core's hybrid model and routing functions on a CPU, in float64, with the weights of one of ours.

Its device is replaced by the CPU, its float32 casts are widened, and what needs Transformer Engine has a
stand-in: linear maps of latent widths, and attention, which here is torch's own, document by document. All
that multi-token prediction and routing consist of is its own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import release
from llm.config import LLMConfig
from tests.llm.widened import Widened

warnings.filterwarnings("ignore")
torch.compiler.set_stance("force_eager")  # it compiles small functions, which takes longer than the check
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

import megatron.core  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer import multi_token_prediction as mtp  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe import moe_layer, moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

__all__ = ["aux_scale", "build", "moe_utils", "mtp", "packed", "started", "translate"]

ACTIVATIONS = {"relu2": squared_relu, "silu": F.silu, "gelu": F.gelu}


@contextlib.contextmanager
def started(store: str) -> Iterator[str]:
    """Its process groups of one process, by way of a new file `store`; gives its version."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield release(megatron.core.__version__)
    finally:
        dist.destroy_process_group()


class _Latent(nn.Module):
    """Stands in for Transformer Engine's duplicated linear map."""

    def __init__(self, width: int, out: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class _Attention(nn.Module):
    """Stands in for Transformer Engine's attention: causal within each document of a packed stream, or
    within each sequence of a batch. The projections around it are megatron-core's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """q [s, b, H, D], or [t, H, D] packed, to [s, b, H D] or [t, H D]."""
        params = kwargs.get("packed_seq_params")
        if params is None:
            heads_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
            y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return y.permute(2, 0, 1, 3).flatten(2)
        lengths = params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        out = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in part), is_causal=True, enable_gqa=True
            ).transpose(0, 1)
            for part in parts
        ]
        return torch.cat(out).flatten(1)


def packed(lengths: Sequence[int]) -> PackedSeqParams:
    """Documents of these lengths end to end."""
    ends = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=sum(lengths),
    )


def _spec() -> ModuleSpec:
    """Layers of its local backend, norms apart from the projections after them."""
    norm, bda = WrappedTorchNorm, get_bias_dropout_add
    linear = {"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear}
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=_Attention, linear_proj=RowParallelLinear
    )
    mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(**linear))
    experts = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    one = mtp.MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=norm
    )
    block = mtp.MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(module=mtp.MultiTokenPredictionLayer, submodules=one)]
    )
    return ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=attention,
                    ),
                    self_attn_bda=bda,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=bda),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=experts, mlp_bda=bda),
            ),
            mtp_block_spec=ModuleSpec(module=mtp.MultiTokenPredictionBlock, submodules=block),
        ),
    )


def build(cfg: LLMConfig, weights: Mapping[str, Tensor]) -> HybridModel:
    """Its model of our config with our `weights` (translate), for training, in float64."""
    mtp.MTPLossLoggingHelper.tracker.clear()  # its log is kept by the process, in the last model's shape
    get_moe_metrics_tracker().clear()
    hybrid_block.TENorm = WrappedTorchNorm
    moe_layer.HAVE_TE, moe_layer.TELinear = True, _Latent
    groups = {"moe_router_num_groups": cfg.expert_groups, "moe_router_group_topk": cfg.top_groups}
    config = TransformerConfig(
        num_layers=len(cfg.symbols),
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_heads,
        num_query_groups=cfg.n_kv_heads,
        kv_channels=cfg.head_dim,
        ffn_hidden_size=cfg.mlp_ffn,
        normalization="RMSNorm",
        layernorm_epsilon=cfg.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=cfg.mlp_gated,
        activation_func=ACTIVATIONS[cfg.activation],
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        num_moe_experts=cfg.n_experts,
        moe_ffn_hidden_size=cfg.expert_ffn,
        moe_shared_expert_intermediate_size=cfg.shared_ffn or None,
        moe_latent_size=cfg.latent,
        moe_router_topk=cfg.top_k,
        moe_router_score_function=cfg.router,
        moe_router_topk_scaling_factor=cfg.routed_scale,
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=cfg.aux_weight,
        moe_z_loss_coeff=cfg.z_weight or None,
        moe_router_dtype="fp64",
        moe_token_dispatcher_type="allgather",
        mtp_num_layers=cfg.mtp_layers,
        mtp_use_repeated_layer=True,
        mtp_loss_scaling_factor=cfg.mtp_weight,
        **(groups if cfg.expert_groups > 1 else {}),
    )
    pattern = "/".join([cfg.symbols] + [cfg.mtp_pattern] * cfg.mtp_layers)
    with Widened():
        model = HybridModel(
            config,
            _spec(),
            cfg.vocab_size,
            4096,
            pattern,
            share_embeddings_and_output_weights=cfg.tied,
            position_embedding_type="none",
        )
    model.double()  # norms are made in the default dtype
    missing, unknown = model.load_state_dict(dict(weights), strict=False)
    assert not unknown and not [n for n in missing if "_extra_state" not in n], (missing, unknown)
    return model.train()


# Below a layer there, from below the layer here.
_NAMES = {
    "*": {"norm.weight": "input_layernorm.weight", "mixer.out.weight": "self_attention.linear_proj.weight"},
    "-": {"norm.weight": "pre_mlp_layernorm.weight", "mixer.down.weight": "mlp.linear_fc2.weight"},
    "E": {
        "norm.weight": "pre_mlp_layernorm.weight",
        "mixer.router.weight": "mlp.router.weight",
        "mixer.expert_bias": "mlp.router.expert_bias",
        "mixer.latent_in.weight": "mlp.fc1_latent_proj.weight",
        "mixer.latent_out.weight": "mlp.fc2_latent_proj.weight",
        "mixer.shared.down.weight": "mlp.shared_experts.linear_fc2.weight",
    },
}
_OUTSIDE = {
    "embed.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_norm.weight",
    "head": "output_layer.weight",
    "mtp.embed_norm.weight": "mtp.layers.0.enorm.weight",
    "mtp.hidden_norm.weight": "mtp.layers.0.hnorm.weight",
    "mtp.join.weight": "mtp.layers.0.eh_proj.weight",
    "mtp.norm.weight": "mtp.layers.0.final_layernorm.weight",
}


def translate(cfg: LLMConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, of one of our models under its names; those that `ours` lacks are not."""
    out = {there: ours[here] for here, there in _OUTSIDE.items() if here in ours}
    stacks = [("layers.", "decoder.layers.", cfg.symbols)]
    if cfg.mtp_layers:
        stacks.append(("mtp.layers.", "mtp.layers.0.mtp_model_layer.layers.", cfg.mtp_pattern))
    for here, there, symbols in stacks:
        for i, symbol in enumerate(symbols):
            a, b = f"{here}{i}.", f"{there}{i}."
            out |= {b + t: ours[a + o] for o, t in _NAMES[symbol].items() if a + o in ours}
            out |= {b + name: t for name, t in _joined(cfg, symbol, a + "mixer.", ours).items()}
    return out


def _joined(cfg: LLMConfig, symbol: str, at: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What it keeps as one tensor and we as several, or the other way round."""

    def up(stem: str, suffix: str = "") -> Tensor:
        parts = (["gate"] if cfg.mlp_gated else []) + ["up"]
        return torch.cat([ours[f"{stem}{p}{suffix}"] for p in parts], -2)

    if symbol == "*":
        # For each key/value head: the query heads that read it, then itself.
        groups = [ours[at + n].unflatten(0, (cfg.n_kv_heads, -1, cfg.head_dim)).flatten(1, 2) for n in "qkv"]
        return {"self_attention.linear_qkv.weight": torch.cat(groups, 1).flatten(0, 1)}
    if symbol == "-":
        return {"mlp.linear_fc1.weight": up(at, ".weight")}
    out = {}
    if cfg.shared_ffn:
        out["mlp.shared_experts.linear_fc1.weight"] = up(f"{at}shared.", ".weight")
    for e, (first, second) in enumerate(zip(up(f"{at}experts."), ours[f"{at}experts.down"], strict=True)):
        out[f"mlp.experts.local_experts.{e}.linear_fc1.weight"] = first
        out[f"mlp.experts.local_experts.{e}.linear_fc2.weight"] = second
    return out


def aux_scale(routed: float, mtp_scale: float) -> None:
    """What gradients of its other objectives are multiplied with: routed, those of routers, which it has as
    sums over tokens; mtp_scale, those of multi-token prediction, as if as many counted as for
    the next token."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(routed, dtype=torch.float64))
    mtp.MTPLossAutoScaler.set_loss_scale(torch.tensor(mtp_scale, dtype=torch.float64))
