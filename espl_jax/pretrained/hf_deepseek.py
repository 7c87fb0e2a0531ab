"""Fields of `config.json` that only DeepSeek-V3 has: its attention, its router and its dense first layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from espl_jax.models.config import DecoderConfig, Experts, Latent
from espl_jax.models.rope import yarn_attention_factor
from espl_jax.pretrained.hf_rope import Fields

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
}
"""Values of fields that a file omits, as in transformers."""

_COMPUTED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
"""Fields that transformers does not read -> the value that the family computes."""


def completed(config: DecoderConfig, c: Fields) -> DecoderConfig:
    """Returns the config with what only this family has.

    Args:
      config: the fields that all families share.
      c: the file.

    Raises:
      ValueError: for an unsupported value.
    """
    for field, computed in _COMPUTED.items():
        if (value := c.get(field)) not in (None, computed):
            raise ValueError(f"{field}={value!r} is not supported for deepseek_v3; supported: {computed!r}")
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_kv_heads}: in latent attention each head has its own keys and "
            f"values; set it to num_attention_heads={config.num_heads}"
        )
    rope, head_dim = config.rope, c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    scaling: Mapping[str, Any] = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    weight = scaling.get("mscale_all_dim")
    if weight and rope.scaling != "yarn":
        raise ValueError(
            f"mscale_all_dim={weight!r} is not supported for rope_type={rope.scaling!r}, only for yarn; "
            "leave it out"
        )
    return config.replace(
        head_dim=head_dim,
        rope=dataclasses.replace(rope, interleaved=bool(c.get("rope_interleave"))),
        query_scale=head_dim**-0.5 * yarn_attention_factor(rope.factor, weight) ** 2 if weight else 0.0,
        latent=Latent(
            kv_rank=c["kv_lora_rank"],
            rope_dim=c["qk_rope_head_dim"],
            value_dim=c["v_head_dim"],
            query_rank=c.get("q_lora_rank") or 0,
        ),
        experts=Experts(
            count=c.get("num_local_experts") or c["n_routed_experts"],
            active=c["num_experts_per_tok"],
            mlp_dim=c["moe_intermediate_size"],
            normalize=bool(c.get("norm_topk_prob")),
            scores="sigmoid",
            scale=c["routed_scaling_factor"],
            corrected=True,
            groups=c.get("n_group") or 1,
            active_groups=c.get("topk_group") or 1,
            shared_dim=c["moe_intermediate_size"] * c["n_shared_experts"],
        ),
        first_dense=c["first_k_dense_replace"],
    )


def fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of `config.json` from which `completed` reads a config.

    Raises:
      ValueError: if the decoder is not of this family.
    """
    latent, experts = config.latent, config.experts
    if latent is None or experts is None:
        raise ValueError("family='deepseek_v3': needs latent attention and experts; set another family")
    return {
        "first_k_dense_replace": config.first_dense,
        "head_dim": latent.rope_dim,  # so transformers writes it
        "kv_lora_rank": latent.kv_rank,
        "moe_intermediate_size": experts.mlp_dim,
        "n_group": experts.groups,
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared_dim // experts.mlp_dim,
        "norm_topk_prob": experts.normalize,
        "num_experts_per_tok": experts.active,
        "num_nextn_predict_layers": 0,  # not trained, and not written
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": config.head_dim - latent.rope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "rope_interleave": config.rope.interleaved,
        "routed_scaling_factor": experts.scale,
        "topk_group": experts.active_groups,
        "v_head_dim": latent.value_dim,
        **_COMPUTED,
    }


def rope_fields(config: DecoderConfig) -> dict[str, float]:
    """Returns what `rope_parameters` also has: the weights of YaRN's scales of scores and of cosines."""
    rope = config.rope
    if rope.scaling != "yarn" or rope.factor <= 1 or not config.query_scale:
        return {}
    scale = math.sqrt(config.query_scale * math.sqrt(config.head_dim))
    # Solved for `weight` of `yarn_attention_factor`; rounded, so that 1.0 in a published file comes back.
    weights = {"mscale": scale * rope.attention_factor, "mscale_all_dim": scale}
    return {name: round((value - 1) / (0.1 * math.log(rope.factor)), 12) for name, value in weights.items()}
