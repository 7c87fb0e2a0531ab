"""The shape of a decoder and how it computes: one frozen, hashable record, a static argument under jit."""

from __future__ import annotations

import dataclasses
from typing import Any

MATMUL_PRECISIONS = ("default", "highest", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture (from the checkpoint) and numerics (ours to choose).

    Attributes:
      vocab_size: V.
      num_layers: L.
      embed_dim: D, width of the residual stream.
      num_heads: N query heads.
      num_kv_heads: K key/value heads; G = N / K queries share one.
      head_dim: H.
      mlp_dim: F.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of RMSNorm.
      tied_head: whether the output head is the embedding.
      max_positions: longest sequence the model was made for, in tokens.
      dtype: KV cache and operands of products, `float32` or `bfloat16`. The residual stream is float32 in
        both: rounded in every layer, it would set sampler and trainer 0.03 nats a token apart.
      param_dtype: how weights are stored.
      matmul_precision: `default` multiplies in `dtype`; `highest` asks for full float32 products on
        accelerators that would round them; `bfloat16` rounds operands (cotangents too) to bfloat16 and
        accumulates in float32, which is what is fast on CPUs with AMX.
      scan_layers: run layers in one `lax.scan` (small programs) or unrolled (faster on some machines).
      slice_as_integers: while sampling, scan bfloat16 weights as 16-bit integers; faster on CPUs.
      remat: recompute each layer in the backward pass instead of storing its activations.
      lora_scale: alpha / rank, the factor of every adapter's product.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"
    matmul_precision: str = "default"
    scan_layers: bool = True
    slice_as_integers: bool = False
    remat: bool = True
    lora_scale: float = 1.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.matmul_precision not in MATMUL_PRECISIONS:
            raise ValueError(
                f"matmul_precision={self.matmul_precision!r} is unknown; choose one of {MATMUL_PRECISIONS}"
            )
        for field in ("dtype", "param_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; choose float32 or bfloat16")

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def from_hf_config(hf: dict[str, Any], **numerics: Any) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` of the Llama family describes.

    Args:
      hf: the parsed file (keys as in transformers' LlamaConfig, old or new spelling of the RoPE settings).
      **numerics: DecoderConfig fields of our own (`dtype`, `matmul_precision`, ...).

    Raises:
      ValueError: for another family, or for a feature that this decoder does not compute.
    """
    if hf.get("model_type") != "llama":
        raise ValueError(f"model_type={hf.get('model_type')!r} is not supported; supported: llama")
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    refused = {"rope_type": (kind, "default"), "hidden_act": (hf.get("hidden_act", "silu"), "silu")}
    refused |= {name: (bool(hf.get(name, False)), False) for name in ("attention_bias", "mlp_bias")}
    for field, (value, supported) in refused.items():
        if value != supported:
            raise ValueError(f"{field}={value!r} is not supported for llama; only {supported!r} is")
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        embed_dim=hf["hidden_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_dim=hf["intermediate_size"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_head=hf.get("tie_word_embeddings", False),
        max_positions=hf.get("max_position_embeddings", 2048),
        **numerics,
    )
