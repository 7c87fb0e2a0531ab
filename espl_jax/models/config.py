"""Configuration of a decoder, architecture and numerics: frozen and hashable, a static argument under jit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from espl_jax.choices import CACHE_DTYPES, DTYPES, MATMUL_PRECISIONS, PARAM_DTYPES, REMATS, SAMPLING_LAYOUTS

ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
PHASES = ("training", "sampling")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
SCORES = ("softmax", "sigmoid")

NUMERICS = ("dtype", "param_dtype", "matmul_precision", "scan_layers", "sampling_layout", "remat")
"""Fields of DecoderConfig that the run chooses, independent of the checkpoint."""


def dtype_name(dtype: Any) -> Any:
    """Returns the name of a jax or numpy dtype, such as `jnp.bfloat16` or `array.dtype`.

    Strings, and values that are not dtypes, are returned unchanged.
    """
    if dtype is None or isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (RoPE).

    Attributes:
      theta: base of the frequencies.
      scaling: `none`; `linear`, which divides all frequencies by `factor`; `llama3`, which divides only low
        frequencies; `yarn`, which interpolates between frequencies with `beta_fast` turns in the original
        context (kept) and those with `beta_slow` turns (divided).
      factor: ratio of the extended to the original context length.
      original_positions: context length before extension (`llama3`, `yarn`).
      low_freq_factor, high_freq_factor: number of turns in the original context below which a frequency is
        divided by `factor`, and above which it is kept (`llama3`).
      beta_fast, beta_slow: number of turns above which a frequency is kept, and below which it is divided
        (`yarn`).
      truncate: whether these two limits are rounded outwards to whole frequency indices (`yarn`).
      attention_factor: scales cosines and sines (`yarn`).
      interleaved: whether neighbouring dimensions are rotated together, rather than those of the two halves.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    interleaved: bool = False

    def __post_init__(self):
        if self.scaling not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling={self.scaling!r} is unknown; choose one of {ROPE_SCALINGS}")
        if self.scaling in ("llama3", "yarn") and self.original_positions < 1:
            raise ValueError(
                f"rope original_positions={self.original_positions}: scaling={self.scaling!r} needs the "
                "context length before extension; give at least 1"
            )
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor}: give a number below high_freq_factor="
                f"{self.high_freq_factor}"
            )

    @property
    def reach(self) -> int:
        """Context length that YaRN extends to; 0 for other scalings, where the checkpoint states it."""
        return int(self.factor * self.original_positions) if self.scaling == "yarn" else 0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538), in place of the MLP of a layer.

    Attributes:
      count: E, number of experts of a layer.
      active: number of experts that process a token.
      mlp_dim: F, width of each expert's feed-forward layer.
      normalize: whether the weights of a token's experts are divided by their sum (`norm_topk_prob`). With
        softmax, the result is the softmax over the scores of these experts alone.
      bias: whether the router and the linear layers of experts have biases.
      scores: what turns the router's outputs into weights, `softmax` over all experts or `sigmoid`.
      scale: factor of the weights, applied last (`routed_scaling_factor`).
      corrected: whether a bias per expert is added to the scores for the choice only (DeepSeek-V3, arXiv
        2412.19437, section 2.1.2). It balances the load of pretraining and has no gradient.
      groups, active_groups: experts form `groups` groups of neighbours, and a token chooses among those of
        its `active_groups` best groups, by the sum of the two best scores of each (`n_group`, `topk_group`).
      shared_dim: width of the feed-forward layer that processes every token besides its experts; 0 for none.
    """

    count: int
    active: int
    mlp_dim: int
    normalize: bool = True
    bias: bool = False
    scores: str = "softmax"
    scale: float = 1.0
    corrected: bool = False
    groups: int = 1
    active_groups: int = 1
    shared_dim: int = 0

    def __post_init__(self):
        if not 1 <= self.active <= self.count:
            raise ValueError(
                f"experts active={self.active}: give at least 1, and at most the number of experts, "
                f"count={self.count}"
            )
        if self.mlp_dim < 1:
            raise ValueError(f"experts mlp_dim={self.mlp_dim}: give at least 1")
        if self.scores not in SCORES:
            raise ValueError(f"experts scores={self.scores!r} is unknown; choose one of {SCORES}")
        if self.shared_dim < 0:
            raise ValueError(
                f"experts shared_dim={self.shared_dim}: give the width of the layer, or 0 for none"
            )
        if not 1 <= self.active_groups <= self.groups:
            raise ValueError(
                f"experts active_groups={self.active_groups}: give at least 1, and at most "
                f"groups={self.groups}"
            )
        if self.groups > 1:
            size, rest = divmod(self.count, self.groups)
            if rest or size < 2 or self.active > self.active_groups * size:
                raise ValueError(
                    f"experts groups={self.groups}: count={self.count} must divide into equal groups of at "
                    f"least 2, and active_groups={self.active_groups} of them must have active={self.active} "
                    "experts; correct one of these numbers"
                )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads
    are linear functions of one latent vector per token, which the KV cache holds in their place.

    The last `rope_dim` dimensions of a head are rotated; there, one key is shared by all heads.

    Attributes:
      kv_rank: C, width of the latent of keys and values (`kv_lora_rank`).
      rope_dim: width of the rotated part of a head (`qk_rope_head_dim`).
      value_dim: width of the values of a head (`v_head_dim`).
      query_rank: width of the latent of queries; 0 if queries are projected directly (`q_lora_rank`).
      norm_eps: epsilon of the norms of both latents.
    """

    kv_rank: int
    rope_dim: int
    value_dim: int
    query_rank: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for field in ("kv_rank", "rope_dim", "value_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"latent {field}={getattr(self, field)}: give at least 1")
        if self.rope_dim % 2:
            raise ValueError(f"latent rope_dim={self.rope_dim}: rotation needs pairs; give an even number")
        if self.query_rank < 0:
            raise ValueError(f"latent query_rank={self.query_rank}: give the width, or 0 for no latent")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture (from the checkpoint) and numerics (chosen by the run) of a decoder.

    Model families differ only in these values; no computation depends on the name of a family.

    Attributes:
      vocab_size: V.
      num_layers: L.
      embed_dim: D, width of the residual stream.
      num_heads: N query heads.
      num_kv_heads: K key/value heads; G = N / K queries share one.
      head_dim: H.
      mlp_dim: F, width of the dense feed-forward layer; unused if the layers are mixtures of experts.
      experts: the mixture of experts of every layer after the first `first_dense`; None for dense layers.
      rope: rotary position embeddings.
      local_rope: those of layers with a window; None if they are the same.
      windows: for each layer, the number of tokens that a token attends to, itself included, or 0 for no
        window; empty if no layer has one.
      norm_eps: epsilon of RMSNorm.
      norm_offset: added to every scale of RMSNorm (Gemma stores scale - 1).
      qk_norm: RMSNorm over H of each query and key head, before rotation (Qwen3, Gemma 3).
      post_norms: RMSNorm of the outputs of attention and MLP, before the residual addition (Gemma).
      qkv_bias, out_bias, mlp_bias: whether these linear layers have biases (Qwen2: `qkv_bias`).
      query_scale: scale of the attention scores; 0 for H ** -0.5.
      embed_scale: scale of the embeddings (Gemma: D ** 0.5).
      activation: of the MLP's gate, `silu` or `gelu_tanh`; or `clamped_swiglu`, which also changes the other
        factor (`layers.clamped_swiglu`).
      tied_head: whether the output head shares the embedding's weight.
      max_positions: longest sequence that the model supports, in tokens.
      family: selects the tensor names and layout of checkpoints, for reading and writing.
      dtype: dtype of the KV cache and of matmul operands, `float32` or `bfloat16`. The residual stream is
        always float32: rounding it in every layer would put sampler and trainer 0.03 nats per token apart.
        jax and numpy dtypes are accepted and converted to their names.
      param_dtype: storage dtype of the weights; same choices, or `int8` for weights that are not trained.
        Matmul weights are then int8 with one float32 scale per output channel (`models.int8`), and
        everything else (norms, biases, sinks, the router) has `dtype`.
      cache_dtype: dtype of the cached keys and values of rows while sampling: `same` for `dtype`, or `int8`
        with one float32 scale for each token and kv head. Levels that rows share have `dtype`.
      matmul_precision: `default` multiplies in `dtype`; `highest` requests full float32 products on
        accelerators that would otherwise round; `bfloat16` rounds operands and cotangents to bfloat16 and
        accumulates in float32, which is fast on CPUs with AMX.
      scan_layers: runs layers in one `lax.scan` (small programs) or unrolled (faster on some machines).
      sampling_layout: layout of the layers' weights while sampling. `stacked` keeps one array per kind of
        weight. `unstacked` gives each layer its own arrays, outputs first, which CPUs read without a copy; it
        needs memory for a second copy of the weights and compiles more slowly. `auto` unstacks on a single
        CPU device.
      remat: what the backward pass recomputes of each layer. The layer's input is always stored. `none`
        recomputes nothing; `attention`, all but the attention output; `products`, all but the results of
        matmuls with weights; `full`, everything. `rounded` is `full` with layer inputs stored in `dtype`, so
        that gradients are evaluated at slightly rounded inputs. `offload` is `full` with layer inputs stored
        in host memory.
      phase: which rules of `espl_jax.parallel.sharding` apply to activations: `training` or `sampling`.
      lora_scale: alpha / rank, the scale of every adapter.
      attention_sinks: whether every query head has a learned logit that joins each of its softmaxes, without
        a value (gpt-oss, OpenAI 2025, arXiv 2508.10925; sinks: Xiao et al. 2023, arXiv 2309.17453).
      swiglu_limit, swiglu_alpha: limit of the factors, and scale inside the sigmoid (`clamped_swiglu`).
      first_dense: number of layers at the beginning whose MLP is dense, in a mixture of experts.
      latent: multi-head latent attention in place of grouped-query attention; None for the latter. `head_dim`
        is then the width of queries and keys, and `qkv_bias` is for the projections to latents.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    windows: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 0.0
    embed_scale: float = 1.0
    activation: str = "silu"
    tied_head: bool = False
    max_positions: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    param_dtype: str = "float32"
    cache_dtype: str = "same"
    matmul_precision: str = "default"
    scan_layers: bool = True
    sampling_layout: str = "auto"
    remat: str = "full"
    phase: str = "training"
    lora_scale: float = 1.0
    experts: Experts | None = None
    attention_sinks: bool = False
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    first_dense: int = 0
    latent: Latent | None = None

    def __post_init__(self):
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, dtype_name(getattr(self, field)))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"windows={self.windows}: give one number for each of the {self.num_layers} layers (0 for a "
                "layer without a window), or an empty tuple"
            )
        if self.experts and self.mlp_bias:
            raise ValueError("mlp_bias=True is not supported with experts; set the bias of Experts instead")
        if not self.swiglu_limit > 0:
            raise ValueError(f"swiglu_limit={self.swiglu_limit}: give a number above 0")
        if not 0 <= self.first_dense < (self.num_layers if self.experts else 1):
            raise ValueError(
                f"first_dense={self.first_dense}: give the number of dense layers before those with experts, "
                f"at most num_layers-1={self.num_layers - 1}, or 0 without experts"
            )
        if self.latent and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: with latent attention every head has its own keys and "
                f"values; set it to num_heads={self.num_heads}"
            )
        if self.latent and not self.latent.rope_dim < self.head_dim:
            raise ValueError(
                f"latent rope_dim={self.latent.rope_dim}: is a part of a head; give less than head_dim="
                f"{self.head_dim}"
            )
        if self.latent and (self.qk_norm or any(self.windows) or self.attention_sinks):
            raise ValueError(
                "latent attention supports neither qk_norm, nor windows, nor attention_sinks; leave them out"
            )
        choices = {
            "matmul_precision": MATMUL_PRECISIONS,
            "activation": ACTIVATIONS,
            "remat": REMATS,
            "phase": PHASES,
            "sampling_layout": SAMPLING_LAYOUTS,
            "dtype": DTYPES,
            "param_dtype": PARAM_DTYPES,
            "cache_dtype": CACHE_DTYPES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; choose one of {allowed}")

    @property
    def float_dtype(self) -> str:
        """Storage dtype of the weights that are not in int8."""
        return self.dtype if self.param_dtype == "int8" else self.param_dtype

    @property
    def routing_shape(self) -> tuple[int, int]:
        """Number of layers with experts, and of active experts in each; the choices of one token."""
        return (self.num_layers - self.first_dense, self.experts.active) if self.experts else (0, 0)

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads of the KV cache, and the widths of its keys and of its values.

        With latent attention, keys are the rotated part alone, and values are the latents.
        """
        if self.latent:
            return 1, self.latent.rope_dim, self.latent.kv_rank
        return self.num_kv_heads, self.head_dim, self.head_dim

    def replace(self, **changes: Any) -> DecoderConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def config_from_dict(fields: dict[str, Any]) -> DecoderConfig:
    """Returns the config from the output of `dataclasses.asdict`, which may have been through JSON."""
    nested = {"rope": Rope, "local_rope": Rope, "experts": Experts, "latent": Latent}
    given = {name: kind(**fields[name]) for name, kind in nested.items() if fields.get(name)}
    return DecoderConfig(**{**fields, **given, "windows": tuple(fields.get("windows", ()))})
