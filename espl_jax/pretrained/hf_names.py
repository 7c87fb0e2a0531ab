"""Names of our weights in Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import jax

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE, Params, Weight, abstract

_MODULES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers/attention_norm": "input_layernorm",
    "layers/attention/query": "self_attn.q_proj",
    "layers/attention/key": "self_attn.k_proj",
    "layers/attention/value": "self_attn.v_proj",
    "layers/attention/out": "self_attn.o_proj",
    "layers/attention/query_norm": "self_attn.q_norm",
    "layers/attention/key_norm": "self_attn.k_norm",
    "layers/mlp_norm": "post_attention_layernorm",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
    "layers/attention/query_down": "self_attn.q_a_proj",
    "layers/attention/query_up": "self_attn.q_b_proj",
    "layers/attention/kv_down": "self_attn.kv_a_proj_with_mqa",
    "layers/attention/kv_norm": "self_attn.kv_a_layernorm",
    "layers/attention/kv_up": "self_attn.kv_b_proj",
}

_WITH_EXPERTS = {
    "layers/mlp/router": "mlp.gate",
    "layers/mlp/gate": "mlp.experts.{}.gate_proj",
    "layers/mlp/up": "mlp.experts.{}.up_proj",
    "layers/mlp/down": "mlp.experts.{}.down_proj",
    "layers/mlp/shared/gate": "mlp.shared_experts.gate_proj",
    "layers/mlp/shared/up": "mlp.shared_experts.up_proj",
    "layers/mlp/shared/down": "mlp.shared_experts.down_proj",
}

# In files, all experts of a layer are in one tensor (`fused_experts`).
_GPT_OSS = {"layers/attention/sinks": "self_attn.sinks", "layers/mlp/router": "mlp.router"}
_WITH_LATENTS = {"layers/attention/query_norm": "self_attn.q_a_layernorm"}

# With post-norms, `post_attention_layernorm` is the norm after attention, not the norm before the MLP.
_WITH_POST_NORMS = {
    "layers/post_attention_norm": "post_attention_layernorm",
    "layers/mlp_norm": "pre_feedforward_layernorm",
    "layers/post_mlp_norm": "post_feedforward_layernorm",
}


def module(path: str, config: DecoderConfig) -> str:
    """Returns the module name for a path of the params (`layers/mlp/up`), with {} for the index of the layer,
    and of the expert."""
    modules = _MODULES | (_WITH_POST_NORMS if config.post_norms else {})
    modules |= _WITH_LATENTS if config.latent else {}
    if path.startswith("first_layers/"):
        path = path.removeprefix("first_")
    elif config.experts:
        modules |= _WITH_EXPERTS
    name = (modules | (_GPT_OSS if config.family == "gpt_oss" else {}))[path]
    return f"model.layers.{{}}.{name}" if path.startswith("layers/") else name


def names(config: DecoderConfig) -> dict[str, str]:
    """Returns path of each weight (`layers/mlp/up/weight`) -> name, with {} for the indices, as `module`.

    Scales of int8 weights are not in files.
    """
    named = {}
    for path in by_path(abstract(config)):
        parent, _, leaf = path.rpartition("/")
        if leaf != SCALE:
            named[path] = f"{module(parent, config)}{_LEAVES[leaf]}"
    return named


_LEAVES = {
    "weight": ".weight",
    "scale": ".weight",
    "bias": ".bias",
    "logit": "",
    "correction": ".e_score_correction_bias",
}
"""Leaf of the params -> what its name in files ends with."""


def stacked(name: str, weight: Weight) -> list[str]:
    """Returns the names of the tensors that are stacked into a weight, in order: all experts of the first
    layer, then those of the second; a single name if it is not stacked."""
    return [name.format(*numbers) for numbers in weight.members]


def by_path(tree: Params) -> dict[str, Any]:
    """Returns the leaves of a params-like tree by path, joined with `/`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def scale_path(path: str) -> str:
    """Returns the path of the scales of the int8 weight at `path`."""
    return f"{path.rpartition('/')[0]}/{SCALE}"
