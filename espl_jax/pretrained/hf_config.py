"""Converts between Hugging Face's `config.json` and DecoderConfig.

Files omit the defaults of their family, and older files write RoPE and windows differently. Features that the
decoder does not support are rejected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from espl_jax.models.config import NUMERICS, DecoderConfig, Experts, Rope
from espl_jax.pretrained import hf_deepseek, hf_rope

_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "llama",
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048},
    ),
    "mistral": (
        "mistral",
        "MistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": (
        "qwen2",
        "Qwen2ForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": (
        "qwen3",
        "Qwen3ForCausalLM",
        {
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "gemma3_text": (
        "gemma3",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "max_position_embeddings": 131_072,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM", hf_deepseek.DEFAULTS),
}
"""model_type -> (family, class in transformers, defaults of the family)."""

SUPPORTED = (*_FAMILIES, "gemma3")
"""Supported values of `model_type`; of the multimodal `gemma3`, only the text model is read."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_LEAST = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 1),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "max_position_embeddings"), 1),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_experts_per_tok"), 1),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1),
    "sliding_window_pattern": 1,
    # Of these, 0 means none, or the default.
    **dict.fromkeys(("num_key_value_heads", "head_dim", "num_local_experts", "n_group", "topk_group"), 0),
    **dict.fromkeys(("sliding_window", "max_window_layers", "q_lora_rank"), 0),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts"), 0),
}
"""Fields that are integers -> their least value."""

_POSITIVE = ("rms_norm_eps", "query_pre_attn_scalar", "routed_scaling_factor", "swiglu_limit", "swiglu_alpha")
"""Fields that are numbers above 0."""


def from_hf_config(hf: dict[str, Any], **numerics: Any) -> DecoderConfig:
    """Returns the DecoderConfig for a parsed `config.json`.

    Args:
      hf: the file as a dict.
      **numerics: DecoderConfig fields that are not in the file (`dtype`, `matmul_precision`, ...).

    Raises:
      ValueError: for an unsupported family or feature.
    """
    model_type = hf.get("model_type")
    if model_type == "gemma3":
        hf = {"tie_word_embeddings": hf.get("tie_word_embeddings", True), **hf.get("text_config", {})}
        model_type = "gemma3_text"
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    family, _, defaults = _FAMILIES[model_type]
    if family == "gpt_oss" and not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        defaults = defaults | {"rope_scaling": _GPT_OSS_ROPE}
        hf = {name: value for name, value in hf.items() if name != "rope_scaling"}
    _check_types({**defaults, **hf})
    c = _Fields(model_type, {**defaults, **hf})
    gemma, gpt_oss = family == "gemma3", family == "gpt_oss"
    activation = c.get("hidden_activation" if gemma else "hidden_act") or "silu"
    none = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    refused = {
        "hidden_act": (activation, _ACTIVATIONS.get(activation) and activation, " or ".join(_ACTIVATIONS))
    }
    refused |= {name: (c.get(name) or None, None, "none") for name in none}
    for field, (value, computed, supported) in refused.items():
        if value != computed:
            raise ValueError(f"{field}={value!r} is not supported for {model_type}; supported: {supported}")

    width, heads = c["hidden_size"], c["num_attention_heads"]
    rope, local_rope = hf_rope.read_ropes(c, gemma)
    # The other families ignore these fields.
    bias = family in _WITH_ATTENTION_BIAS and bool(c.get("attention_bias"))
    config = DecoderConfig(
        family=family,
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or width // heads,
        mlp_dim=c["intermediate_size"],
        rope=rope,
        local_rope=local_rope,
        windows=_windows(c, family),
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3"),
        post_norms=gemma,
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family == "llama" and bool(c.get("mlp_bias")),
        query_scale=c["query_pre_attn_scalar"] ** -0.5 if gemma else 0.0,
        embed_scale=width**0.5 if gemma else 1.0,
        activation="clamped_swiglu" if gpt_oss else _ACTIVATIONS[activation],
        tied_head=c["tie_word_embeddings"],
        max_positions=max(c["max_position_embeddings"], rope.reach),
        experts=_EXPERTS[family](c) if family in _EXPERTS else None,
        **_gpt_oss(c) if gpt_oss else {},
        **numerics,
    )
    return hf_deepseek.completed(config, c) if family == "deepseek_v3" else config


def _check_types(fields: Mapping[str, Any]) -> None:
    """Raises for a field that is present and of another type than the family computes with."""

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"{name}={fields[name]!r}: must be {wanted}; use config.json of the original model")

    given = {name: value for name, value in fields.items() if value is not None}
    for name in given.keys() & _LEAST.keys():
        if type(given[name]) is not int or given[name] < _LEAST[name]:
            refuse(name, f"an integer of at least {_LEAST[name]}")
    for name in given.keys() & set(_POSITIVE):
        if type(given[name]) not in (int, float) or not given[name] > 0:
            refuse(name, "a number above 0")
    for name in given.keys() & {"hidden_act", "hidden_activation"}:
        if not isinstance(given[name], str):
            refuse(name, "the name of an activation")
    kinds = given.get("layer_types", [])
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
        refuse("layer_types", "a list of names")


class _Fields:
    """Fields of a file; a missing field without a default raises an error with its name."""

    def __init__(self, model_type: str, fields: Mapping[str, Any]):
        self._model_type, self.get = model_type, fields.get

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ValueError(f"config.json of a {self._model_type} has no {name}; download the file again")
        return value


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, for `from_hf_config` and transformers.

    RoPE is written in the current format and, for older readers, in the previous one.

    Raises:
      ValueError: if the format of the family cannot represent a value of the decoder.
    """
    model_type, architecture = next(
        (name, architecture)
        for name, (family, architecture, _) in _FAMILIES.items()
        if family == config.family
    )
    gemma = config.family == "gemma3"
    rope = hf_rope.rope_parameters(config.rope)
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation" if gemma else "hidden_act": next(
            (theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation), "silu"
        ),
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_positions,
    }
    if config.family in _WITH_ATTENTION_BIAS:
        fields["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        fields["sliding_window"] = max(config.windows, default=0) or None
    if config.family in ("qwen2", "qwen3", "gemma3", "gpt_oss"):
        windows = config.windows or (0,) * config.num_layers
        fields["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
        fields["sliding_window"] = max(windows) or None
        if config.family.startswith("qwen"):
            fields["use_sliding_window"] = any(windows)
            fields["max_window_layers"] = next((i for i, w in enumerate(windows) if w), config.num_layers)
    if config.family == "qwen3_moe":
        window = max(config.windows, default=0)
        fields |= {"use_sliding_window": bool(window), "sliding_window": window or None}
    if config.family == "gpt_oss":
        fields |= {"swiglu_limit": config.swiglu_limit, "swiglu_alpha": config.swiglu_alpha}
    if config.experts and config.family == "gpt_oss":
        fields |= {
            "intermediate_size": config.experts.mlp_dim,
            "num_local_experts": config.experts.count,
            "num_experts_per_tok": config.experts.active,
        }
    if config.family == "deepseek_v3":
        fields |= hf_deepseek.fields(config)
        rope |= hf_deepseek.rope_fields(config)
    if config.experts and config.family == "qwen3_moe":
        fields |= {
            "num_experts": config.experts.count,
            "num_experts_per_tok": config.experts.active,
            "moe_intermediate_size": config.experts.mlp_dim,
            "norm_topk_prob": config.experts.normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if gemma:
        local = hf_rope.rope_parameters(config.local_rope or config.rope)
        fields["query_pre_attn_scalar"] = round((config.query_scale or config.head_dim**-0.5) ** -2)
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        fields["rope_local_base_freq"] = local["rope_theta"]
    else:
        fields["rope_parameters"] = rope

    numerics = {name: getattr(config, name) for name in (*NUMERICS, "lora_scale")}
    read_back = from_hf_config({"model_type": model_type, **fields}, **numerics)
    for field in dataclasses.fields(config):
        wanted, got = getattr(config, field.name), getattr(read_back, field.name)
        if not _same(wanted, got, config):
            raise ValueError(
                f"{field.name}={wanted!r}: a {model_type} config.json cannot represent it (it reads back as "
                f"{got!r}); the decoder does not belong to the family {config.family!r}"
            )
    older = {name: value for name, value in rope.items() if name != "rope_theta"}
    # For a gpt-oss, no scaling would mean YaRN.
    unscaled = rope["rope_type"] == "default" and config.family != "gpt_oss"
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **fields,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if unscaled else older,
    }


def _experts(c: _Fields) -> Experts:
    """Returns the mixture of experts of every layer of a Qwen3-MoE.

    Dense layers are supported before those with experts (`DecoderConfig.first_dense`), and not between them.
    """
    for field, uniform in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (value := c.get(field)) not in (None, uniform):
            raise ValueError(
                f"{field}={value!r} is not supported: it makes some layers dense, and only models with "
                f"experts in every layer are supported ({field}={uniform!r}); use another model"
            )
    return Experts(
        count=c.get("num_local_experts") or c["num_experts"],  # transformers 5 writes the first name
        active=c["num_experts_per_tok"],
        mlp_dim=c["moe_intermediate_size"],
        normalize=bool(c["norm_topk_prob"]),
    )


def _gpt_oss_experts(c: _Fields) -> Experts:
    """Returns the mixture of experts of every layer of a gpt-oss."""
    return Experts(
        count=c["num_local_experts"],
        active=c["num_experts_per_tok"],
        mlp_dim=c["intermediate_size"],
        normalize=True,  # it applies softmax to the scores of the chosen experts
        bias=True,
    )


_EXPERTS = {"qwen3_moe": _experts, "gpt_oss": _gpt_oss_experts}
"""Families with experts -> reader of their fields."""

_WITH_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe", "gemma3", "gpt_oss", "deepseek_v3")
"""Families that read `attention_bias`."""

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""RoPE of a gpt-oss whose file has no parameters for it."""


def _gpt_oss(c: _Fields) -> dict[str, Any]:
    """Returns the fields of DecoderConfig that only gpt-oss has."""
    return {
        "attention_sinks": True,
        "swiglu_limit": float(c["swiglu_limit"]),
        "swiglu_alpha": float(c["swiglu_alpha"]),
    }


def _windows(c: _Fields, family: str) -> tuple[int, ...]:
    if family in ("llama", "deepseek_v3"):
        return ()
    window, layers, kinds = c.get("sliding_window"), c["num_hidden_layers"], c.get("layer_types") or ()
    if family.startswith("qwen") and not c.get("use_sliding_window"):
        window = None
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types has {', '.join(sorted(unknown))}, which is not supported; supported: "
            "full_attention, sliding_attention"
        )
    if family == "qwen3_moe":  # transformers ignores the layer types, and gives every layer the window
        return (window,) * layers if window else ()
    if kinds and len(kinds) != layers:
        raise ValueError(
            f"layer_types has {len(kinds)} entries, but num_hidden_layers={layers}; give one entry per layer"
        )
    if "sliding_attention" in kinds and not window:
        raise ValueError(
            "sliding_window is missing, or switched off by use_sliding_window, but layer_types names "
            "sliding_attention; correct one of them in config.json"
        )
    if not window:
        return ()
    if kinds:
        local = [kind == "sliding_attention" for kind in kinds]
    elif family == "gpt_oss":
        local = [bool((i + 1) % 2) for i in range(layers)]
    elif family == "gemma3":
        local = [bool((i + 1) % c["sliding_window_pattern"]) for i in range(layers)]
    else:
        local = [i >= (c.get("max_window_layers") or 0) for i in range(layers)]
    return tuple(window if each else 0 for each in local) if any(local) else ()


def _same(wanted: Any, got: Any, config: DecoderConfig) -> bool:
    """Returns whether values are equivalent: no local RoPE means the global one, scale 0 means H ** -0.5."""
    if isinstance(wanted, float) and isinstance(got, float):
        plain = config.head_dim**-0.5
        return wanted == got or math.isclose(wanted or plain, got or plain, rel_tol=1e-6)
    if isinstance(wanted, Rope | None) and isinstance(got, Rope | None):
        return (wanted or config.rope) == (got or config.rope)
    return wanted == got
