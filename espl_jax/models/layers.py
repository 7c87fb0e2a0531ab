"""The pieces of a decoder layer that see one token at a time.

Letters here and in `attention.py` and `transformer.py`: T tokens (all levels of the tree flattened
together), D model, N query heads, K kv heads, G queries per kv head, H head, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from espl_jax.models.config import DecoderConfig
from espl_jax.parallel import sharding

Linear = dict[str, jax.Array]
"""`weight` (or `outputs_first`), beside it a `bias` if it has one, and `lora_a`, `lora_b` with an adapter."""

OUTPUTS_FIRST = "outputs_first"
"""Name, in place of `weight`, of an `Unstacked` one: the outputs' axes come before those of the inputs."""

FEW_ROWS = range(2, 65)
"""Numbers of rows for which XLA's CPU backend multiplies weight by rows faster than rows by weight."""


class Unstacked(NamedTuple):
    """One kind of weight as a separate array for every layer, and the layer that is meant.

    Attributes:
      weights: of all layers, outputs first.
      layer: int32 [], the number of one of them.
    """

    weights: tuple[jax.Array, ...]
    layer: jax.Array


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def check_ids(name: str, ids: Any, config: DecoderConfig, lengths: Any = None) -> None:
    """Refuses token ids outside the vocabulary where their values are known: for those a gather would read
    another token's row. Nothing is known while a function is traced, nor of arrays spread over processes.

    Args:
      name: what to call the ids in the error.
      ids: int [...], or [R, T] with lengths.
      config: the decoder.
      lengths: int [R], how many of each row are tokens; all of them by default.

    Raises:
      ValueError: naming the first such id.
    """
    given = ids if lengths is None else (ids, lengths)
    for x in jax.tree.leaves(given):
        if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return
    values = np.asarray(ids)
    wrong = (values < 0) | (values >= config.vocab_size)
    if lengths is not None:
        wrong &= np.arange(values.shape[1]) < np.asarray(lengths)[:, None]
    if wrong.any():
        raise ValueError(
            f"{name}: token id {int(values[wrong][0])} is outside the model's vocabulary, "
            f"vocab_size={config.vocab_size}; give ids from 0 to {config.vocab_size - 1}"
        )


def einsum(
    spec: str, x: jax.Array, linear: Linear, config: DecoderConfig, out_dtype: str | None = None
) -> jax.Array:
    """Multiplies activations with a weight: the one door through which every linear weight is used.

    With an adapter (Hu et al. 2021, arXiv 2106.09685) the result is `x W + scale * (x A) B`, and the sum
    `W + scale * A B` is never formed, so that rounding of the base weights does not touch the adapter.

    Args:
      spec: einsum subscripts `x,weight->out`; `r` is taken by the adapter's rank.
      x: activations.
      linear: `weight`, optionally `lora_a` [contracted dims of the weight..., r], `lora_b` [r, others...],
        and `bias` [the result's last dims...].
      config: numerics and `lora_scale`.
      out_dtype: of the result, where rounding it to `config.dtype` would lose too much.

    Returns:
      The product in float32 when `matmul_precision` is `bfloat16`, else in `out_dtype` or `config.dtype`.
    """
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    contracted = "".join(c for c in right if c in left)
    kept = "".join(c for c in right if c not in left)
    if OUTPUTS_FIRST in linear:
        weights, layer = linear[OUTPUTS_FIRST]
        multiply = functools.partial(product, f"{left},{kept}{contracted}->{result}", x)
        # Only the product is chosen by the layer's number: choosing the weight would copy it.
        branches = [functools.partial(multiply, w, config, out_dtype) for w in weights]
        out = jax.lax.switch(layer, branches)
    else:
        out = product(spec, x, linear["weight"], config, out_dtype)
    if "lora_a" in linear:
        batch = "".join(c for c in left if c not in contracted)
        low = product(f"{left},{contracted}r->{batch}r", x, linear["lora_a"], config)
        out = out + config.lora_scale * product(
            f"{batch}r,r{kept}->{result}", low, linear["lora_b"], config, out_dtype
        )
    if "bias" in linear:
        # In float32, in which its gradient is then summed over the tokens.
        out = (out.astype(jnp.float32) + linear["bias"].astype(jnp.float32)).astype(out.dtype)
    return out


def product(
    spec: str, x: jax.Array, weight: jax.Array, config: DecoderConfig, out_dtype: str | None = None
) -> jax.Array:
    """`einsum` without adapters and biases: casts and multiplies as `config` says."""
    if config.matmul_precision == "bfloat16":
        return _bfloat16_product(spec, x, weight)
    precision = jax.lax.Precision.HIGHEST if config.matmul_precision == "highest" else None
    x, weight = x.astype(config.dtype), weight.astype(config.dtype)
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=out_dtype)
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    rows = math.prod(n for n, letter in zip(x.shape, left, strict=True) if letter not in right)
    on_cpu = config.phase == "sampling" and config.sampling_layout == "unstacked"
    if on_cpu and right[0] not in left and rows in FEW_ROWS:
        kept = "".join(c for c in right if c not in left)
        weight_first = kept + "".join(c for c in left if c not in right)
        out = multiply(f"{right},{left}->{weight_first}", weight, x)
        return out.transpose([weight_first.index(c) for c in result])
    return multiply(spec, x, weight)


def rounded(weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """A weight in the dtype that products take it to, where that one is smaller: half as much to move."""
    smaller = jnp.dtype(config.dtype).itemsize < weight.dtype.itemsize
    return weight.astype(config.dtype) if smaller and config.matmul_precision == "default" else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bfloat16_product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _rounded(spec, x, weight)


def _rounded(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of bfloat16 roundings, summed in float32, as one product of matrices.

    XLA's CPU backend takes bfloat16 operands to float32 only in plain matrix products.
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
    # The derivative of a product of bfloat16 operands mixes them with a float32 cotangent, for which CPUs
    # have no fast path; rounding the cotangent too keeps both products on it.
    x, weight = operands
    inputs, result = spec.split("->")
    left, right = inputs.split(",")
    x_bar = _rounded(f"{result},{right}->{left}", g, weight).astype(x.dtype)
    weight_bar = _rounded(f"{left},{result}->{right}", x, g).astype(weight.dtype)
    return x_bar, weight_bar


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


def rms_norm(x: jax.Array, norm: dict[str, jax.Array], config: DecoderConfig) -> jax.Array:
    """Root-mean-square normalization (Zhang and Sennrich 2019, arXiv 1910.07467), computed in float32.

    [..., D] -> [..., D] in `config.dtype`.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    return (x * (norm["scale"].astype(jnp.float32) + config.norm_offset)).astype(config.dtype)


def gated_mlp(x: jax.Array, weights: dict[str, Any], config: DecoderConfig) -> jax.Array:
    """Gated feed-forward (Shazeer 2020, arXiv 2002.05202). [T, D] -> [T, D]."""

    def placed(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, ("tokens", "mlp"), config.phase)

    activate = _ACTIVATIONS[config.activation]
    gate = placed(einsum("td,df->tf", x, weights["gate"], config))
    up = placed(einsum("td,df->tf", x, weights["up"], config))
    return einsum("tf,fd->td", placed(activate(gate) * up), weights["down"], config)


def embed(tokens: jax.Array, embedding: Linear, config: DecoderConfig) -> jax.Array:
    """Looks tokens up: the residual stream's beginning. int32 [T] -> float32 [T, D]."""
    # First as the table lies, then moved: the table itself never is.
    x = sharding.constrain(embedding["weight"][tokens], ("lookup", "embed"), config.phase)
    x = rounded(x, config).astype(jnp.float32) * config.embed_scale
    # In two steps, both of which the compiler has collectives for: from the other axis, then a part of that.
    x = sharding.constrain(x, ("tokens", None), config.phase)
    return sharding.constrain(x, ("residual", None), config.phase)
