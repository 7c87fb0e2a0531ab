"""The pieces of a decoder layer that see one token at a time.

Letters here and in `attention.py` and `transformer.py`: T tokens (all levels of the tree flattened
together), D model, N query heads, K kv heads, G queries per kv head, H head, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from espl_jax import sharding
from espl_jax.models.config import DecoderConfig

Linear = dict[str, jax.Array]
"""`weight`, beside it a `bias` if it has one, and `lora_a`, `lora_b` when an adapter is attached."""

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


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
    out = product(spec, x, linear["weight"], config, out_dtype)
    if "lora_a" in linear:
        inputs, result = spec.split("->")
        left, right = inputs.split(",")
        contracted = "".join(c for c in right if c in left)
        kept = "".join(c for c in right if c not in left)
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
    if weight.dtype == jnp.uint16:
        weight = jax.lax.bitcast_convert_type(weight, jnp.bfloat16)
    if config.matmul_precision == "bfloat16":
        return _bfloat16_product(spec, x, weight)
    precision = jax.lax.Precision.HIGHEST if config.matmul_precision == "highest" else None
    operands = x.astype(config.dtype), weight.astype(config.dtype)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=out_dtype)


def rounded(weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """A weight in the dtype that products take it to, where that one is smaller: half as much to move."""
    smaller = jnp.dtype(config.dtype).itemsize < weight.dtype.itemsize
    return weight.astype(config.dtype) if smaller and config.matmul_precision == "default" else weight


def as_integers(weights: Any) -> Any:
    """bfloat16 weights seen as 16-bit integers, for `product` to turn back; other leaves as they are.

    For sampling with scanned layers on CPUs, where XLA slices a bfloat16 array one number at a time and an
    integer array by copying memory, eight times as fast. No gradient flows through it.
    """

    def view(path: tuple, x: jax.Array) -> jax.Array:
        is_weight = path[-1].key == "weight" and x.dtype == jnp.bfloat16
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_weight else x

    return jax.tree_util.tree_map_with_path(view, weights)


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
