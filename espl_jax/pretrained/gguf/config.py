"""Converts the metadata of GGUF files to DecoderConfig."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from espl_jax.models.config import DecoderConfig, Rope
from espl_jax.models.rope import frequencies, yarn_attention_factor
from espl_jax.pretrained.gguf.file import GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
"""Supported values of `general.architecture`; `llama` includes Mistral."""

GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_PATTERN = 6
"""Defaults of Gemma 3: the RoPE base of layers with a window, and every sixth layer without a window."""

LLAMA3_ORIGINAL_POSITIONS = 8192

Field = Callable[..., Any]


def config_from_gguf(file: GGUFFile, **numerics: Any) -> DecoderConfig:
    """Returns the DecoderConfig for a file.

    Args:
      file: an opened GGUF file.
      **numerics: DecoderConfig fields that are not in the file (`dtype`, `matmul_precision`, ...).

    Raises:
      ValueError: for an unsupported architecture or feature, or a missing field.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    field = _fields(file, architecture)
    embed_dim, num_layers = field("embedding_length"), field("block_count")
    num_heads = field("attention.head_count")
    head_dim = field("attention.key_length", embed_dim // num_heads)
    refused = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.dimension_count_swa": head_dim,
        "expert_count": 0,
        "attn_logit_softcapping": 0.0,
        "final_logit_softcapping": 0.0,
    }
    for name, supported in refused.items():
        if (value := field(name, supported)) != supported:
            raise ValueError(
                f"{file.path}: {architecture}.{name}={value!r} is not supported; only {supported!r} is"
            )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor token_embd.weight is missing; convert the model again")

    windows = _windows(file, field, architecture, num_layers)
    rope = _rope(file, field, head_dim)
    family = "mistral" if architecture == "llama" and windows else architecture
    theirs: dict[str, Any] = {"qk_norm": architecture == "qwen3"}
    if architecture == "gemma3":
        is_27b = (num_layers, embed_dim) == (62, 5376)
        theirs = {
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": 1.0,
            "activation": "gelu_tanh",
            "embed_scale": math.sqrt(embed_dim),
            "query_scale": (embed_dim / num_heads if is_27b else head_dim) ** -0.5,
            "local_rope": Rope(theta=field("rope.freq_base_swa", GEMMA3_LOCAL_THETA)),
        }
    return DecoderConfig(
        # The vocabulary may be padded beyond the tokenizer's, so take its size from the weight.
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=field("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_dim=field("feed_forward_length"),
        rope=rope,
        windows=windows,
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        # The metadata does not mention biases.
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tied_head="output.weight" not in file.tensors,
        max_positions=max(field("context_length"), rope.reach),
        family=family,
        **theirs,
        **numerics,
    )


def _fields(file: GGUFFile, architecture: str) -> Field:
    """Returns a function that looks up `<architecture>.<name>`; without a default the field is required."""

    def field(name: str, default: Any = None) -> Any:
        key = f"{architecture}.{name}"
        if key not in file.metadata:
            if default is None:
                raise ValueError(f"{file.path}: the field {key} is missing; convert the model again")
            return default
        value = file.metadata[key]
        # Stored as float32: 1e-5 comes back as 9.999999747e-06.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    return field


def _windows(file: GGUFFile, field: Field, architecture: str, num_layers: int) -> tuple[int, ...]:
    """Returns the window of each layer in tokens, 0 for none; () if no layer has a window."""
    window = field("attention.sliding_window", 0)
    if architecture.startswith("qwen"):
        # In Qwen, windows start at a layer that the file does not specify.
        if 0 < window < field("context_length"):
            raise ValueError(
                f"{file.path}: {architecture}.attention.sliding_window={window} is not supported, because "
                "the file does not say in which layers; convert the model with use_sliding_window=false"
            )
        return ()
    if not window:
        return ()
    # Every pattern-th layer has no window (0: all layers have one); or a list with an entry per layer.
    pattern = field("attention.sliding_window_pattern", GEMMA3_PATTERN if architecture == "gemma3" else 0)
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(num_layers)]
    windows = tuple(window if local else 0 for local in pattern)
    return windows if any(windows) else ()


_ROPE_KEYS = {
    *("freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa", "scale_linear"),
    *("scaling.type", "scaling.factor", "scaling.original_context_length", "scaling.finetuned"),
    *("scaling.attn_factor", "scaling.yarn_attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
}
"""RoPE fields that are read, or do not affect the result."""


def _rope(file: GGUFFile, field: Field, head_dim: int) -> Rope:
    architecture = file.metadata["general.architecture"]
    names = {key.partition(".rope.")[2] for key in file.metadata if key.startswith(f"{architecture}.rope.")}
    if unknown := sorted(names - _ROPE_KEYS):
        warnings.warn(
            f"{file.path}: unknown fields {', '.join(unknown)} of {architecture}.rope are ignored",
            stacklevel=2,
        )
    theta = field("rope.freq_base", 10_000.0)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    # Older files have only the factor of linear scaling.
    scaling = field("rope.scaling.type", "linear")
    factor = field("rope.scaling.factor", field("rope.scale_linear", 1.0))
    match scaling:
        case "none":
            return Rope(theta)
        case "linear":
            return Rope(theta, "linear", factor) if factor not in (0.0, 1.0) else Rope(theta)
        case "yarn":
            positions, factor = field("rope.scaling.original_context_length"), field("rope.scaling.factor")
            return Rope(
                theta,
                "yarn",
                factor,
                original_positions=positions,
                beta_fast=field("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=field("rope.scaling.yarn_beta_slow", 1.0),
                attention_factor=field(
                    "rope.scaling.yarn_attn_factor",
                    field("rope.scaling.attn_factor", yarn_attention_factor(factor)),
                ),
            )
    raise ValueError(
        f"{file.path}: rope.scaling.type={scaling!r} is not supported; supported: none, linear, yarn, and "
        "Llama 3's by the tensor rope_freqs.weight"
    )


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> Rope:
    """Returns Llama 3's scaling; the file has only the divisor of each frequency."""
    divisors = file.dequantize("rope_freqs.weight")
    rope = Rope(theta, "llama3", float(divisors.max()), LLAMA3_ORIGINAL_POSITIONS)
    expected = frequencies(Rope(theta), head_dim) / frequencies(rope, head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{file.path}: rope_freqs.weight is not Llama 3's scaling (from {LLAMA3_ORIGINAL_POSITIONS} "
            f"positions, low_freq_factor {rope.low_freq_factor}, high_freq_factor {rope.high_freq_factor}, "
            f"factor {rope.factor:g}); load the model from its safetensors instead"
        )
    return rope if rope.factor > 1.0 else Rope(theta)
