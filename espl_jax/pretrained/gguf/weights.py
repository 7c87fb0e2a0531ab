"""Converts the tensors of GGUF files to decoder params.

Weights have the layout of other checkpoints, `[outputs, inputs]`, with two exceptions. Query and key rows of
the architecture `llama` are in the order of interleaved RoPE (pairs adjacent), and are permuted to our order
of half-rotation (first halves of all pairs, then second halves). And norm scales that other checkpoints store
minus one (Gemma) are stored in full.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE, Weight, abstract
from espl_jax.pretrained.gguf.file import GGUFFile
from espl_jax.pretrained.hf_names import by_path, scale_path
from espl_jax.pretrained.layout import file_shape, from_file
from espl_jax.pretrained.stream import quantize

Params = dict[str, Any]

NAMES = {
    "embedding": "token_embd",
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/attention/query": "blk.{}.attn_q",
    "layers/attention/key": "blk.{}.attn_k",
    "layers/attention/value": "blk.{}.attn_v",
    "layers/attention/out": "blk.{}.attn_output",
    "layers/attention/query_norm": "blk.{}.attn_q_norm",
    "layers/attention/key_norm": "blk.{}.attn_k_norm",
    "layers/post_attention_norm": "blk.{}.post_attention_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
    "layers/post_mlp_norm": "blk.{}.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}
"""Path of a module in the params -> its name in the file, with {} for the layer index."""

CONSUMED_BY_CONFIG = {"rope_freqs.weight"}


def params_from_gguf(file: GGUFFile, config: DecoderConfig) -> Params:
    """Dequantizes every weight of the file.

    Args:
      file: an opened GGUF file.
      config: its decoder, from `config_from_gguf`.

    Returns:
      numpy arrays in `config.param_dtype`, with the tree and shapes of `abstract(config)`.

    Raises:
      ValueError: if a tensor is missing, has a wrong shape, or is not part of this decoder.
    """
    declared = by_path(abstract(config))
    names = {path: _names(path, config) for path in declared if not path.endswith(SCALE)}
    _check_complete(file, {name for layers in names.values() for name in layers})
    # Filled one layer at a time, to save memory; not views of the file, which may be replaced during the run.
    leaves = {path: np.empty(weight.shape, jnp.dtype(weight.dtype)) for path, weight in declared.items()}

    def rows(path: str) -> np.ndarray:
        return leaves[path] if path.startswith("layers/") else leaves[path][None]

    for path, layers in names.items():
        weight = declared[path]
        for number, name in enumerate(layers):
            values = _layer(file, name, path, weight, config)
            if weight.dtype == "int8":
                values, rows(scale_path(path))[number] = quantize(weight, values, f"{file.path}: {name}")
            rows(path)[number] = values
    return jax.tree.unflatten(jax.tree.structure(abstract(config)), list(leaves.values()))


def _names(path: str, config: DecoderConfig) -> list[str]:
    """Returns the tensors of a weight: one per layer, or a single one."""
    node, _, leaf = path.rpartition("/")
    name = f"{NAMES[node]}.{'bias' if leaf == 'bias' else 'weight'}"
    return [name.format(layer) for layer in range(config.num_layers)] if "{}" in name else [name]


def _check_complete(file: GGUFFile, names: set[str]) -> None:
    if missing := sorted(names - set(file.tensors)):
        raise ValueError(
            f"{file.path}: {len(missing)} tensors are missing, beginning with {', '.join(missing[:5])}; "
            "convert the model again"
        )
    if extra := sorted(set(file.tensors) - names - CONSUMED_BY_CONFIG):
        raise ValueError(
            f"{file.path}: unexpected tensors {', '.join(extra[:5])}: the model has an unsupported "
            "feature; use another model"
        )


def _layer(file: GGUFFile, name: str, path: str, weight: Weight, config: DecoderConfig) -> np.ndarray:
    """Returns one layer of a weight in our layout, float32."""
    stored, expected = file.tensors[name].shape, file_shape(weight)
    if stored != expected:
        raise ValueError(
            f"{file.path}: {name} has shape {list(stored)}, but the metadata says {list(expected)}"
        )
    values = file.dequantize(name)
    if file.metadata["general.architecture"] == "llama" and ("/query/" in path or "/key/" in path):
        values = _half_rotation(values, config.head_dim)
    if path.endswith("/scale"):
        values = values - config.norm_offset
    return from_file(weight, values)


def _half_rotation(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Permutes rows [N * H, ...] from `[N, H/2, 2]` (interleaved RoPE) to `[N, 2, H/2]`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
