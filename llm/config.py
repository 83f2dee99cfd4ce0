"""The config of a language model. Pure; llm.checks says which are possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.rotary import RopeAxes, RopeScaling
from llm.source import Source

KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "dense MLP"}

Activation = Literal["relu2", "gelu", "gelu_tanh", "silu", "clamped"]


@dataclass(frozen=True)
class LLMConfig:
    """A hybrid model of the Nemotron-H family (arXiv 2504.03624, 2512.20848), or a dense transformer.

    A field in [brackets] is the key of the published models' config.json (llm.hf.config). Widths are in
    features. Weights of objectives multiply means over a whole step (llm.counts).
    """

    pattern: str = "M*E-ME"
    """One symbol a layer: M Mamba-2, E experts, * attention, - dense MLP; | between layers ends a stage
    of the pipeline. [hybrid_override_pattern]"""
    d_model: int = 128
    """Width of the residual stream. [hidden_size]"""
    vocab_size: int = 264
    """Tokens in the vocabulary: rows of the embedding and of the head. [vocab_size]"""

    n_heads: int = 8
    """Query heads of attention. [num_attention_heads]"""
    n_kv_heads: int = 4
    """Key/value heads; equal runs of query heads share one (arXiv 2305.13245). [num_key_value_heads]"""
    head_dim: int = 16
    """Width of an attention head; even with rope_theta. [head_dim]"""
    rope_theta: float | None = None
    """Base of rotary positions (arXiv 2104.09864); None for no positions, as Nemotron-H."""
    attention_bias: bool = False
    """Whether the four projections of attention have biases; the published models have none."""
    qkv_bias: bool = False
    """Whether those of queries, keys and values have them, but that of the output has not."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys before positions: of each head (Qwen 3), or over all heads (OLMo 2)."""
    rope_scaling: RopeScaling | None = None
    """Change of rotary speeds for longer contexts."""
    rope_axes: RopeAxes | None = None
    """Positions of three axes (M-RoPE), as Qwen's vision-language models have them; None: of one."""
    rope_share: float = 1.0
    """Share of a head's features, the first, that positions turn. [partial_rotary_factor]"""
    rope_skips: tuple[int, ...] = ()
    """Attention layers, by index, without positions (arXiv 2501.18795)."""
    window: int | None = None
    """Keys that a token of a windowed layer sees, the last ones, its own included. [sliding_window]"""
    window_layers: tuple[int, ...] | None = None
    """Attention layers, by index, that have the window; None: all."""
    window_rope_theta: float | None = None
    """Base of rotary positions in windowed layers, then without rope_scaling; None: as in other layers."""
    attention_scale: float | None = None
    """Factor on attention's scores; None: head_dim ** -0.5."""
    attention_cap: float | None = None
    """c in c tanh(score / c), which bounds scores (Gemma 2, arXiv 2408.00118, section 2); None: no bound."""

    attention_sinks: bool = False
    """Whether each head has a learned score that takes attention and gives nothing (gpt-oss)."""

    mamba_heads: int = 16
    """Heads of Mamba-2 (arXiv 2405.21060, section 7). [mamba_num_heads]"""
    mamba_head_dim: int = 16
    """Width of a Mamba-2 head; mamba_heads * mamba_head_dim is the inner width. [mamba_head_dim]"""
    mamba_state: int = 16
    """Width of the state that each feature of a head has. [ssm_state_size]"""
    mamba_groups: int = 4
    """Groups of heads; the heads of one read the same B and C. [n_groups]"""
    conv_kernel: int = 4
    """Taps of the causal convolution, in tokens. [conv_kernel]"""
    chunk: int = 64
    """Tokens in a chunk of the scan (arXiv 2405.21060, section 6): speed only. [chunk_size]"""

    n_experts: int = 8
    """Routed experts in an E layer. [n_routed_experts]"""
    top_k: int = 2
    """Routed experts that a token goes to. [num_experts_per_tok]"""
    expert_ffn: int = 64
    """Hidden width of a routed expert. [moe_intermediate_size]"""
    shared_ffn: int = 128
    """Hidden width of the shared expert, 0 for none. [moe_shared_expert_intermediate_size]"""
    latent: int | None = None
    """Width that routed experts take and give (arXiv 2601.18089); None: d_model. [moe_latent_size]"""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """Scores of a token's experts: sigmoid as in DeepSeek-V3 and Nemotron 3, softmax as in Mixtral."""
    norm_top_k: bool = True
    """Whether the scores of the chosen experts are divided by their sum. [norm_topk_prob]"""
    routed_scale: float = 2.5
    """Factor on the routing weights. [routed_scaling_factor]"""
    expert_groups: int = 1
    """Equal groups of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). [n_group]"""
    top_groups: int = 1
    """Best groups, from which alone a token's experts are chosen (same section). [topk_group]"""
    expert_bias_rate: float = 1e-3
    """Step of the routing bias after each global batch, in units of a score (same section); 0 keeps it."""
    aux_weight: float = 0.0
    """Weight of the balance loss of each document (arXiv 2412.19437, equations 17 to 20)."""
    z_weight: float = 0.0
    """Weight of the squared log-partition of the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    capacity: float | None = None
    """Rows that an expert takes from a rank, in units of the even share tokens * top_k / n_experts; it drops
    the least probable rest, which breaks law 1 (results depend on the layout). None: no row is dropped."""
    pad_experts: bool = False
    """Whether each expert's rows are filled with zeros up to its capacity, for static shapes."""
    dispatcher: Literal["all_to_all", "all_gather"] = "all_to_all"
    """How rows reach their experts; changes no result."""

    moe_bias: bool = False
    """Whether the router and the routed experts have biases (gpt-oss)."""

    mlp_ffn: int = 256
    """Hidden width of a dense MLP. [intermediate_size]"""
    mlp_gated: bool = False
    """act(gate x) * (up x) in the place of act(up x) (arXiv 2002.05202); dense MLPs and all experts alike."""
    mlp_bias: bool = False
    """Whether dense MLPs and shared experts have biases. [mlp_bias]"""
    activation: Activation = "relu2"
    """act of dense MLPs and of all experts; relu2 is the squared ReLU (arXiv 2109.08668), gelu_tanh the
    approximation of gelu (arXiv 1606.08415, section 2), clamped the gate of gpt-oss. [mlp_hidden_act]"""

    mtp_layers: int = 0
    """Depths of multi-token prediction: one stored block, applied once a depth (arXiv 2512.20856, section
    2.3); 0 for none. [num_nextn_predict_layers, which counts stored blocks]"""
    mtp_pattern: str = "*E"
    """One symbol for each layer of that block. [mtp_hybrid_override_pattern]"""
    mtp_weight: float = 0.3
    """Weight of the mean over depths of each depth's mean loss (arXiv 2412.19437, equation 25)."""

    tied: bool = False
    """Whether the head is the embedding; the published models are untied. [tie_word_embeddings]"""
    level_layers: tuple[int, ...] = ()
    """Layers, by index, after which an encoder's levels 1, 2, .. are added (DeepStack, arXiv 2406.04334)."""
    norms: Literal["before", "after", "both"] = "before"
    """Where a residual branch has norms: before its mixer, after it (OLMo 2, arXiv 2501.00656), or both."""
    norm_shift: bool = False
    """Whether norms multiply by 1 + weight, which starts at 0 (Gemma), not by weight, which starts at 1."""
    embed_scale: float = 1.0
    """Factor on embeddings of tokens; rows of encoders enter after it. [embedding_multiplier]"""
    branch_scale: float = 1.0
    """Factor on each residual branch. [residual_multiplier]"""
    logit_scale: float = 1.0
    """Factor on logits. [1 / logits_scaling]"""
    logit_cap: float | None = None
    """c in c tanh(logit / c), after logit_scale; None: no bound. [final_logit_softcapping]"""
    norm_eps: float = 1e-5
    """Added to the mean square in every norm. [layer_norm_epsilon]"""
    init_std: float = 0.02
    """Standard deviation of initial weights; out_std follows from it. [initializer_range]"""
    loss_chunk: int = 2048
    """Tokens whose logits exist at a time: memory only."""
    freeze: bool = False
    """Whether the model's parameters stay as they are."""
    source: Source | None = None
    """The published model that it was read from (llm.hf.read_config)."""

    @property
    def symbols(self) -> str:
        """One symbol a layer: the pattern without |."""
        return self.pattern.replace("|", "")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of layers in the model and in its block of multi-token prediction."""
        return frozenset(self.symbols + (self.mtp_pattern if self.mtp_layers else ""))

    @property
    def rope_width(self) -> int:
        """Features of a head that positions turn, the first."""
        return int(self.head_dim * self.rope_share)

    def window_of(self, layer: int | None) -> int | None:
        """The window of an attention layer, by its index (None: multi-token prediction); None for none."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    def rope_of(self, layer: int | None) -> tuple[float | None, RopeScaling | None]:
        """Base (None: no positions) and scaling of the rotary positions of an attention layer."""
        if layer in self.rope_skips:
            return None, None
        if self.window_rope_theta is not None and self.window_of(layer) is not None:
            return self.window_rope_theta, None
        return self.rope_theta, self.rope_scaling

    @property
    def mamba_inner(self) -> int:
        """Inner width of Mamba-2."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def expert_width(self) -> int:
        """Width of the rows that routed experts take and give."""
        return self.latent or self.d_model

    @property
    def out_std(self) -> float:
        """Initial standard deviation of projections into the residual stream: init_std / sqrt(layers).

        For a dense transformer this is GPT-2's init_std / sqrt(2 blocks): a block is two layers here.
        """
        std: float = self.init_std / max(1, len(self.symbols)) ** 0.5
        return std


def embeds_last(cfg: LLMConfig) -> bool:
    """Whether the last pipeline stage needs the embedding too, for its head or for multi-token prediction."""
    return cfg.tied or cfg.mtp_layers > 0
