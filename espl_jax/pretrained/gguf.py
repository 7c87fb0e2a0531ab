"""GGUF files of the Llama family as decoder params.

GGUF stores a weight as rows of outputs, `[out, in]`, and names layers `blk.<i>`. Its query and key rows come
in the order of interleaved RoPE (pairs side by side); ours is the order of half-rotation (first halves of all
pairs, then second halves), so those rows are put back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from espl_jax.models.config import DecoderConfig

ARCHITECTURES = ("llama",)

Params = dict[str, Any]
Convert = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, opened but with its weights still packed on disk.

    Attributes:
      path: where it lies.
      metadata: its fields by their GGUF names, as plain Python values.
      tensors: its tensors by name, quantized and memory-mapped.
    """

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file and checks that it is whole.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not GGUF, or is truncated or damaged.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file; give the path of a .gguf file")
    # The reader trusts every offset in the file, so that a short file fails in many ways.
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) cannot be read as GGUF: it is another kind of file, "
            f"truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def config_from_gguf(file: GGUFFile, **numerics: Any) -> DecoderConfig:
    """The decoder that the file's metadata describes.

    Args:
      file: an opened GGUF file.
      **numerics: DecoderConfig fields of our own (`dtype`, `matmul_precision`, ...).

    Raises:
      ValueError: for an architecture or a feature that the decoder does not compute, or a missing field.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )

    def field(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise ValueError(
                f"{file.path}: the field {architecture}.{name} is missing; convert the model anew"
            )
        return value

    embed_dim = field("embedding_length")
    num_heads = field("attention.head_count")
    head_dim = field("attention.key_length", embed_dim // num_heads)
    refused = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": "none",
        "expert_count": 0,
    }
    for name, supported in refused.items():
        if (value := field(name, supported)) != supported:
            raise ValueError(
                f"{file.path}: {architecture}.{name}={value!r} is not supported; only {supported!r} is"
            )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor token_embd.weight is missing; convert the model anew")
    return DecoderConfig(
        # The vocabulary may be padded beyond the tokenizer's, so the weight tells its size.
        vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
        num_layers=field("block_count"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=field("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_dim=field("feed_forward_length"),
        rope_theta=field("rope.freq_base", 10_000.0),
        # Stored as float32: 1e-5 comes back as 9.999999747e-06.
        norm_eps=float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        tied_head="output.weight" not in file.tensors,
        max_positions=field("context_length"),
        **numerics,
    )


def params_from_gguf(file: GGUFFile, config: DecoderConfig) -> Params:
    """Dequantizes every weight of the file.

    Args:
      file: an opened GGUF file.
      config: its decoder, from `config_from_gguf`.

    Returns:
      float32 numpy arrays, layers stacked on the leading axis (V, L, D, N, K, H, F as in DecoderConfig):
      `embedding.weight` [V, D]; `layers.attention.{query,key,value}.weight` [L, D, N or K, H],
      `layers.attention.out.weight` [L, N, H, D]; `layers.mlp.{gate,up}.weight` [L, D, F],
      `layers.mlp.down.weight` [L, F, D]; `layers.{attention_norm,mlp_norm}.scale` [L, D];
      `final_norm.scale` [D]; and, unless the head is tied, `head.weight` [V, D].

    Raises:
      ValueError: if a tensor is missing, has another shape than the config's, or is not of this decoder.
    """
    weights = _weights(config)
    layers = range(config.num_layers)
    names = {name.format(layer) for name, _, _ in weights.values() for layer in layers}
    if missing := sorted(names - set(file.tensors)):
        raise ValueError(
            f"{file.path}: {len(missing)} tensors are missing, beginning with {', '.join(missing[:5])}; "
            "convert the model anew"
        )
    if extra := sorted(set(file.tensors) - names):
        raise ValueError(
            f"{file.path}: tensors that this decoder does not use: {', '.join(extra[:5])}; "
            "the model has a feature (biases, RoPE factors, ...) that is not supported"
        )
    params: Params = {}
    for path, (name, shape, convert) in weights.items():
        if "{}" in name:
            leaf = _stack(file, name, shape, convert, config.num_layers)
        else:
            leaf = convert(_dequantize(file, name, shape))
        *parents, last = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def _weights(config: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...], Convert]]:
    """Path in the params -> (name in the file, shape in the file, how that becomes one layer of ours)."""
    c = config
    n, k, h, d, f, v = c.num_heads, c.num_kv_heads, c.head_dim, c.embed_dim, c.mlp_dim, c.vocab_size
    layers = {
        "attention.query.weight": ("attn_q", (n * h, d), lambda w: _half_rotation(w, n).T.reshape(d, n, h)),
        "attention.key.weight": ("attn_k", (k * h, d), lambda w: _half_rotation(w, k).T.reshape(d, k, h)),
        "attention.value.weight": ("attn_v", (k * h, d), lambda w: w.T.reshape(d, k, h)),
        "attention.out.weight": ("attn_output", (d, n * h), lambda w: w.T.reshape(n, h, d)),
        "mlp.gate.weight": ("ffn_gate", (f, d), np.transpose),
        "mlp.up.weight": ("ffn_up", (f, d), np.transpose),
        "mlp.down.weight": ("ffn_down", (d, f), np.transpose),
        "attention_norm.scale": ("attn_norm", (d,), np.asarray),
        "mlp_norm.scale": ("ffn_norm", (d,), np.asarray),
    }
    weights = {
        f"layers.{path}": (f"blk.{{}}.{name}.weight", shape, convert)
        for path, (name, shape, convert) in layers.items()
    }
    # Copies: an unquantized tensor is a view of the file, which may be replaced. (Layers are copied anyway.)
    weights["embedding.weight"] = ("token_embd.weight", (v, d), np.array)
    weights["final_norm.scale"] = ("output_norm.weight", (d,), np.array)
    if not c.tied_head:
        weights["head.weight"] = ("output.weight", (v, d), np.array)
    return weights


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """[N * H, D] with rows `[N, H/2, 2]`, as interleaved RoPE wants them -> rows `[N, 2, H/2]`."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _stack(
    file: GGUFFile, name: str, shape: tuple[int, ...], convert: Convert, num_layers: int
) -> np.ndarray:
    first = convert(_dequantize(file, name.format(0), shape))
    stacked = np.empty((num_layers, *first.shape), np.float32)
    stacked[0] = first
    for layer in range(1, num_layers):
        stacked[layer] = convert(_dequantize(file, name.format(layer), shape))
    return stacked


def _dequantize(file: GGUFFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = file.tensors[name]
    # GGUF lists dimensions from the fastest to the slowest.
    stored = tuple(int(size) for size in reversed(tensor.shape))
    if stored != shape:
        raise ValueError(f"{file.path}: {name} has shape {list(stored)}, but the metadata says {list(shape)}")
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    except NotImplementedError as error:
        raise ValueError(
            f"{file.path}: {name} is stored as {tensor.tensor_type.name}, which gguf cannot dequantize; "
            "take another quantization of the model (F16 and Q8_0 always work)"
        ) from error
