"""The shape of a decoder and how it computes: one frozen, hashable record, a static argument under jit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from espl_jax.choices import MATMUL_PRECISIONS, REMATS, SAMPLING_LAYOUTS

ACTIVATIONS = ("silu", "gelu_tanh")
PHASES = ("training", "sampling")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")

NUMERICS = ("dtype", "param_dtype", "matmul_precision", "scan_layers", "sampling_layout", "remat")
"""Fields of DecoderConfig that are ours to choose, whatever the checkpoint."""


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype that is given as jax or numpy have it (`jnp.bfloat16`, `np.dtype("float32")`, an
    array's `dtype`). Names, and what is no dtype, come back as they are."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
      theta: base of the frequencies.
      scaling: `none`; `linear`, all frequencies divided by `factor`; `llama3`, only the slow ones; `yarn`,
        frequency by frequency, between what turns `beta_fast` times in the original context and what turns
        `beta_slow` times.
      factor: how much longer contexts became.
      original_positions: length of the contexts that the model was first trained on (`llama3`, `yarn`).
      low_freq_factor, high_freq_factor: turns in the original context below which a frequency is divided, and
        above which it stays (`llama3`).
      beta_fast, beta_slow: turns above which a frequency stays, and below which it is divided (`yarn`).
      truncate: whether those two limits are widened to whole frequencies (`yarn`).
      attention_factor: what cosines and sines are multiplied with (`yarn`).
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

    def __post_init__(self):
        if self.scaling not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling={self.scaling!r} is unknown; choose one of {ROPE_SCALINGS}")
        if self.scaling in ("llama3", "yarn") and self.original_positions < 1:
            raise ValueError(
                f"rope scaling={self.scaling!r} needs original_positions, the length of the contexts that "
                f"the model was first trained on; it is {self.original_positions}"
            )
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor}: give one below high_freq_factor="
                f"{self.high_freq_factor}"
            )

    @property
    def reach(self) -> int:
        """Length of the contexts that YaRN stretches to; 0 for the others, whose models name their own."""
        return int(self.factor * self.original_positions) if self.scaling == "yarn" else 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture (from the checkpoint) and numerics (ours to choose).

    Families of models differ by these values alone; nothing below asks for a family by its name.

    Attributes:
      vocab_size: V.
      num_layers: L.
      embed_dim: D, width of the residual stream.
      num_heads: N query heads.
      num_kv_heads: K key/value heads; G = N / K queries share one.
      head_dim: H.
      mlp_dim: F.
      rope: rotary positions.
      local_rope: those of layers with a window; None where they are the same.
      windows: for each layer how many tokens a token sees, itself included, 0 for all before it; empty where
        no layer has a window.
      norm_eps: epsilon of RMSNorm.
      norm_offset: added to every scale of RMSNorm (Gemma stores scales less one).
      qk_norm: RMSNorm over H of each query and key head, before its rotation (Qwen3, Gemma 3).
      post_norms: RMSNorm of what attention and MLP return, before it joins the residual stream (Gemma).
      qkv_bias, out_bias, mlp_bias: whether these linear layers have biases (Qwen2: the first).
      query_scale: factor of the attention scores; 0 for H ** -0.5.
      embed_scale: factor of the embeddings (Gemma: D ** 0.5).
      activation: of the MLP's gate, `silu` or `gelu_tanh`.
      tied_head: whether the output head is the embedding.
      max_positions: longest sequence the model was made for, in tokens.
      family: whose names and layout checkpoints carry, on the way in and out.
      dtype: KV cache and operands of products, `float32` or `bfloat16`. The residual stream is float32 in
        both: rounded in every layer, it would set sampler and trainer 0.03 nats a token apart. A dtype of jax
        or numpy becomes its name.
      param_dtype: how weights are stored; likewise.
      matmul_precision: `default` multiplies in `dtype`; `highest` asks for full float32 products on
        accelerators that would round them; `bfloat16` rounds operands (cotangents too) to bfloat16 and
        accumulates in float32, which is what is fast on CPUs with AMX.
      scan_layers: run layers in one `lax.scan` (small programs) or unrolled (faster on some machines).
      sampling_layout: of the layers' weights while sampling. `stacked` keeps one array per kind of weight;
        `unstacked` gives each layer its own arrays, outputs first, which CPUs read without copying them. It
        takes memory for a second copy, and longer to compile. `auto` unstacks on one CPU device.
      remat: what the backward pass recomputes of each layer, beside the layer's input, which is stored:
        `none`, `attention` (all but its result), `products` (all but the results of products with weights),
        `full`; `rounded`, which is `full` with the inputs stored in `dtype`, so that gradients are taken next
        to where values were; and `offload`, which is `full` with the inputs stored in the host's memory.
      phase: which rules of `espl_jax.parallel.sharding` say where activations lie: `training` or `sampling`.
      lora_scale: alpha / rank, the factor of every adapter's product.
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
    matmul_precision: str = "default"
    scan_layers: bool = True
    sampling_layout: str = "auto"
    remat: str = "full"
    phase: str = "training"
    lora_scale: float = 1.0

    def __post_init__(self):
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, dtype_name(getattr(self, field)))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"windows={self.windows}: give one for each of the {self.num_layers} layers, 0 where a layer "
                "sees everything, or none at all"
            )
        choices = {
            "matmul_precision": MATMUL_PRECISIONS,
            "activation": ACTIVATIONS,
            "remat": REMATS,
            "phase": PHASES,
            "sampling_layout": SAMPLING_LAYOUTS,
            "dtype": ("float32", "bfloat16"),
            "param_dtype": ("float32", "bfloat16"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; choose one of {allowed}")

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def config_from_dict(fields: dict[str, Any]) -> DecoderConfig:
    """The inverse of `dataclasses.asdict`, also after a passage through JSON."""
    ropes = {name: Rope(**fields[name]) for name in ("rope", "local_rope") if fields.get(name)}
    return DecoderConfig(**{**fields, **ropes, "windows": tuple(fields.get("windows", ()))})
