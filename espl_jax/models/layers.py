"""Token-wise parts of a decoder layer: linear layers, norms, MLP and embedding.

Shape letters here, in `attention.py` and in `transformer.py`: T tokens (of all nodes of a level, flattened),
D model width, N query heads, K kv heads, G query heads per kv head, H head width, F feed-forward width, V
vocabulary size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE
from espl_jax.parallel import sharding

Linear = dict[str, jax.Array]
"""Arrays of a linear layer: `weight` (or `outputs_first`), `weight_scale` if that is int8, optionally `bias`,
and `lora_a` and `lora_b` with an adapter."""

OUTPUTS_FIRST = "outputs_first"
"""Name of an `Unstacked` weight, in place of `weight`: its output axes come before its input axes."""

FEW_ROWS = range(2, 65)
"""Numbers of rows for which XLA's CPU backend computes weight @ rows faster than rows @ weight."""


class Unstacked(NamedTuple):
    """One kind of weight as a separate array per layer, and the index of the layer to use.

    Attributes:
      weights: one array per layer, outputs first.
      layer: int32 [], index into `weights`.
    """

    weights: tuple[jax.Array, ...]
    layer: jax.Array


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
"""Activation of a gate -> function; `clamped_swiglu` is a function of both factors."""


def check_ids(name: str, ids: Any, decoder: DecoderConfig, lengths: Any = None) -> None:
    """Raises if a token id is outside the vocabulary, where a gather would silently read another token's row.

    Does nothing if the values are not available: under tracing, and for arrays that span several processes.

    Args:
      name: name of the ids in the error message.
      ids: int [...], or [R, T] with lengths.
      decoder: the model's configuration.
      lengths: int [R], the number of valid ids of each row; all by default.

    Raises:
      ValueError: naming the first invalid id.
    """
    given = ids if lengths is None else (ids, lengths)
    for x in jax.tree.leaves(given):
        if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return
    values = np.asarray(ids)
    wrong = (values < 0) | (values >= decoder.vocab_size)
    if lengths is not None:
        wrong &= np.arange(values.shape[1]) < np.asarray(lengths)[:, None]
    if wrong.any():
        raise ValueError(
            f"{name}: token id {int(values[wrong][0])} is outside the model's vocabulary, "
            f"vocab_size={decoder.vocab_size}; give ids from 0 to {decoder.vocab_size - 1}"
        )


def einsum(
    spec: str,
    x: jax.Array,
    linear: Linear,
    decoder: DecoderConfig,
    out_dtype: str | None = None,
    contracts: str = "",
) -> jax.Array:
    """Applies a linear layer. Every use of a linear weight goes through this function.

    With an adapter (LoRA, Hu et al. 2021, arXiv 2106.09685) the result is `x W + scale * (x A) B`. The merged
    weight `W + scale * A B` is never formed, so the storage precision of W does not round the adapter.

    Args:
      spec: einsum subscripts `x,weight->out`; the letter `r` is reserved for the adapter's rank.
      x: activations.
      linear: `weight`; `weight_scale` [other dims of the weight...] if that is int8; optionally `lora_a`
        [contracted dims of the weight..., r], `lora_b` [r, other dims...] and `bias` [last dims of the
        result...].
      decoder: numerics and `lora_scale`.
      out_dtype: dtype of the result, where rounding to `decoder.dtype` would lose too much.
      contracts: logical axis of the contracted dims of which devices may each hold a part.

    Returns:
      The result; in float32 if `matmul_precision` is `bfloat16`, else in `out_dtype` or `decoder.dtype`.
    """
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    contracted = "".join(c for c in right if c in left)
    kept = "".join(c for c in right if c not in left)
    scale, accumulated = linear.get(SCALE), "float32"
    scaled = scale is not None and contracts
    if scaled and sharding.splits(x, left.index(contracted[0]), contracts, decoder.phase):
        # Devices sum their parts of the result in this dtype, before it is scaled.
        accumulated = decoder.dtype
    if OUTPUTS_FIRST in linear:
        weights, layer = linear[OUTPUTS_FIRST]
        multiply = functools.partial(product, f"{left},{kept}{contracted}->{result}", x)
        # Switch between matmuls, not between weights: selecting a weight would copy it.
        branches = [functools.partial(multiply, w, decoder, out_dtype, scale) for w in weights]
        out = jax.lax.switch(layer, branches)
    else:
        out = product(spec, x, linear["weight"], decoder, out_dtype, scale, accumulated)
    if "lora_a" in linear:
        batch = "".join(c for c in left if c not in contracted)
        low = product(f"{left},{contracted}r->{batch}r", x, linear["lora_a"], decoder)
        out = out + decoder.lora_scale * product(
            f"{batch}r,r{kept}->{result}", low, linear["lora_b"], decoder, out_dtype
        )
    if "bias" in linear:
        # In float32, so that the bias gradient is summed over tokens in float32.
        out = (out.astype(jnp.float32) + linear["bias"].astype(jnp.float32)).astype(out.dtype)
    return out


def product(
    spec: str,
    x: jax.Array,
    weight: jax.Array,
    decoder: DecoderConfig,
    out_dtype: str | None = None,
    scale: jax.Array | None = None,
    accumulated: str = "float32",
) -> jax.Array:
    """Computes `einsum` without adapter and bias, with the dtypes and precision of `decoder`.

    An int8 weight is multiplied in the compute dtype, which holds its values exactly. The result, in the
    dtype `accumulated`, is multiplied by its `scale` in float32. Such a weight has no gradient.
    """
    if scale is None:
        return _product(spec, x, weight, decoder, out_dtype)
    return _scaled(_product, spec, decoder, (accumulated, out_dtype), x, weight, scale)


def _product(
    spec: str, x: jax.Array, weight: jax.Array, decoder: DecoderConfig, out_dtype: str | None = None
) -> jax.Array:
    if decoder.matmul_precision == "bfloat16":
        return _bfloat16_product(spec, x, weight)
    precision = jax.lax.Precision.HIGHEST if decoder.matmul_precision == "highest" else None
    x, weight = x.astype(decoder.dtype), weight.astype(decoder.dtype)
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=out_dtype)
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    rows = math.prod(n for n, letter in zip(x.shape, left, strict=True) if letter not in right)
    on_cpu = decoder.phase == "sampling" and decoder.sampling_layout == "unstacked"
    if on_cpu and right[0] not in left and rows in FEW_ROWS:
        kept = "".join(c for c in right if c not in left)
        weight_first = kept + "".join(c for c in left if c not in right)
        out = multiply(f"{right},{left}->{weight_first}", weight, x)
        return out.transpose([weight_first.index(c) for c in result])
    return multiply(spec, x, weight)


def product_by_head(
    spec: str, x: jax.Array, weight: jax.Array, decoder: DecoderConfig, scale: jax.Array | None = None
) -> jax.Array:
    """Computes `product` with one matrix per head: the letter of heads is in both operands and the result."""
    if scale is None:
        return _product_by_head(spec, x, weight, decoder)
    return _scaled(_product_by_head, spec, decoder, ("float32", None), x, weight, scale)


def _product_by_head(
    spec: str, x: jax.Array, weight: jax.Array, decoder: DecoderConfig, out_dtype: str | None = None
) -> jax.Array:
    rounds = decoder.matmul_precision == "bfloat16"
    precision = jax.lax.Precision.HIGHEST if decoder.matmul_precision == "highest" else None
    x, weight = (each.astype("bfloat16" if rounds else decoder.dtype) for each in (x, weight))
    out_dtype = "float32" if rounds else out_dtype
    return jnp.einsum(spec, x, weight, precision=precision, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _scaled(
    multiply: Callable[..., jax.Array],
    spec: str,
    decoder: DecoderConfig,
    dtypes: tuple[str, str | None],
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Multiplies by an int8 weight with the function `multiply`, scales the result, and then rounds it.

    `dtypes` are `accumulated` and `out_dtype` of `product`.
    """
    accumulated, out_dtype = dtypes
    out = multiply(spec, x, weight, decoder, accumulated).astype(jnp.float32)
    rounds = decoder.matmul_precision == "bfloat16"
    return (out * _spread(scale, spec)).astype("float32" if rounds else out_dtype or decoder.dtype)


def _spread(scale: jax.Array, spec: str) -> jax.Array:
    """Returns the scales of a weight with an axis for each letter of the result, of size 1 if it has none."""
    inputs, result = spec.split("->")
    letters = [c for c in inputs.split(",")[1] if c in result]
    ordered = scale.transpose([letters.index(c) for c in result if c in letters])
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if c in letters else 1 for c in result])


def _scaled_forward(multiply, spec, decoder, dtypes, x, weight, scale):
    out = _scaled(multiply, spec, decoder, dtypes, x, weight, scale)
    return out, (jnp.empty(0, x.dtype), weight, scale)


def _scaled_backward(multiply, spec, decoder, dtypes, residuals, g: jax.Array):
    # The scale belongs to what this product contracts, so it joins the cotangent, in whose dtype the product
    # is computed as it would be for a float weight.
    like, weight, scale = residuals
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    g = (g.astype(jnp.float32) * _spread(scale, spec)).astype(g.dtype)
    x_bar = multiply(f"{result},{right}->{left}", g, weight, decoder.replace(dtype=g.dtype))
    return x_bar.astype(like.dtype), None, None


_scaled.defvjp(_scaled_forward, _scaled_backward)


def rounded(weight: jax.Array, decoder: DecoderConfig) -> jax.Array:
    """Casts a weight to the compute dtype if that is smaller, to move half the bytes between devices."""
    smaller = jnp.dtype(decoder.dtype).itemsize < weight.dtype.itemsize
    return weight.astype(decoder.dtype) if smaller and decoder.matmul_precision == "default" else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bfloat16_product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _rounded(spec, x, weight)


def _rounded(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies operands rounded to bfloat16, accumulating in float32, as a single plain matrix product.

    XLA's CPU backend supports bfloat16 operands with float32 results only for plain matrix products.
    """
    inputs, result = spec.split("->")
    left, right = inputs.split(",")

    def as_matrix(operand: jax.Array, letters: str, other: str, free: str) -> tuple[jax.Array, str]:
        contracted_first = letters[0] in other
        split = sum((c in other) == contracted_first for c in letters)
        rows = math.prod(operand.shape[:split])
        return operand.astype(jnp.bfloat16).reshape(rows, -1), f"c{free}" if contracted_first else f"{free}c"

    (x2, left2), (y2, right2) = as_matrix(x, left, right, "a"), as_matrix(y, right, left, "b")
    result2 = "ab" if result[0] in left else "ba"
    out = jnp.einsum(f"{left2},{right2}->{result2}", x2, y2, preferred_element_type=jnp.float32)
    sizes = dict(zip(left, x.shape, strict=True)) | dict(zip(right, y.shape, strict=True))
    return out.reshape([sizes[letter] for letter in result])


def _bfloat16_product_forward(spec: str, x: jax.Array, weight: jax.Array):
    return _rounded(spec, x, weight), (x, weight)


def _bfloat16_product_backward(spec: str, operands: tuple[jax.Array, jax.Array], g: jax.Array):
    # Autodiff would multiply a float32 cotangent with bfloat16 operands, for which CPUs have no fast path.
    # Rounding the cotangent as well keeps both products of the backward pass on the fast path.
    x, weight = operands
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    x_bar = _rounded(f"{result},{right}->{left}", g, weight).astype(x.dtype)
    weight_bar = _rounded(f"{left},{result}->{right}", x, g).astype(weight.dtype)
    return x_bar, weight_bar


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


def rms_norm(
    x: jax.Array, norm: dict[str, jax.Array], decoder: DecoderConfig, eps: float | None = None
) -> jax.Array:
    """Applies RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in float32.

    [..., D] -> [..., D] in `decoder.dtype`. The default `eps` is `decoder.norm_eps`.
    """
    x = x.astype(jnp.float32)
    eps = decoder.norm_eps if eps is None else eps
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * (norm["scale"].astype(jnp.float32) + decoder.norm_offset)).astype(decoder.dtype)


def gated_mlp(x: jax.Array, weights: dict[str, Any], decoder: DecoderConfig) -> jax.Array:
    """Applies the gated feed-forward layer (Shazeer 2020, arXiv 2002.05202). [T, D] -> [T, D]."""

    def placed(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, ("tokens", "mlp"), decoder.phase)

    gate = placed(einsum("td,df->tf", x, weights["gate"], decoder))
    up = placed(einsum("td,df->tf", x, weights["up"], decoder))
    return einsum("tf,fd->td", placed(gated(gate, up, decoder)), weights["down"], decoder, contracts="mlp")


def gated(gate: jax.Array, up: jax.Array, decoder: DecoderConfig) -> jax.Array:
    """Returns the hidden layer of a gated feed-forward layer. [T, F], [T, F] -> [T, F]."""
    if decoder.activation == "clamped_swiglu":
        return clamped_swiglu(gate, up, decoder.swiglu_limit, decoder.swiglu_alpha)
    return _ACTIVATIONS[decoder.activation](gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float, alpha: float) -> jax.Array:
    """Returns `gate * sigmoid(alpha * gate) * (up + 1)`, with both clamped first. [T, F], [T, F] -> [T, F].

    The gate is clamped from above by `limit`, `up` from both sides (gpt-oss, OpenAI 2025, arXiv 2508.10925,
    as released).
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def embed(tokens: jax.Array, embedding: Linear, decoder: DecoderConfig) -> jax.Array:
    """Looks up token embeddings, the start of the residual stream. int32 [T] -> float32 [T, D]."""
    # First sharded like the table, then resharded: this moves the looked-up rows and never the table.
    x = sharding.constrain(embedding["weight"][tokens], ("lookup", "embed"), decoder.phase)
    x = rounded(x, decoder).astype(jnp.float32) * decoder.embed_scale
    if SCALE in embedding:
        x *= sharding.constrain(embedding[SCALE][tokens], ("lookup",), decoder.phase)[:, None]
    # Resharding takes two steps, each of which is one collective for the compiler.
    x = sharding.constrain(x, ("tokens", None), decoder.phase)
    return sharding.constrain(x, ("residual", None), decoder.phase)
