"""Mixtures of experts: routing, and the experts' gated feed-forward layers as grouped matrix products.

The rows of a grouped product are a token's activations, once for each expert that it chose, sorted by expert.
No choice is dropped, and no expert has a capacity.

On a mesh, each device holds E / `expert` experts (`sharding.RULES`). An all-gather along `expert` brings it
the tokens of the other devices, it computes its own experts for them, and a reduce-scatter sums the results.
How many tokens chose its experts is known only at run time, so its arrays have room for all choices of the
gathered tokens, and only the real ones are multiplied. Long levels are gathered in chunks (`ROW_BYTES`). With
`tensor` (and in sampling `fsdp`), every expert is split along F, as dense layers are.

Shape letters: T tokens, D model width, E experts, A active experts of a token, F width of an expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from espl_jax.models import grouped, layers
from espl_jax.models.config import DecoderConfig, Experts
from espl_jax.models.params import ADAPTER, SCALE, Params
from espl_jax.parallel import sharding

ROW_BYTES = 2**30
"""Most bytes of one array with a row for each choice of the gathered tokens; longer levels take several
chunks."""

EXPERTS = ("gate", "up", "down")
"""Names of the linear layers that every expert has; the other one is the `router`."""


class Routing(NamedTuple):
    """The choices of every token.

    Attributes:
      choices: int32 [T, A], the experts that the router prefers, in order of falling preference.
      used: int32 [T, A], the experts that process the token: `choices`, unless others are replayed.
      weights: float32 [T, A], weights in the sum of the experts that are used.
      entropy: float32 [T], of the probabilities of all experts, in nats.
    """

    choices: jax.Array
    used: jax.Array
    weights: jax.Array
    entropy: jax.Array


def route(
    x: jax.Array, router: layers.Linear, decoder: DecoderConfig, replay: jax.Array | None = None
) -> Routing:
    """Chooses each token's experts: those with the highest probability.

    Probabilities, in float32, are the softmax of the router's scores over all experts, as in Qwen3 (Qwen
    2025, arXiv 2505.09388), or their sigmoids, as in DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437, section
    2.1.2), where a bias corrects the choice and groups limit it. With softmax and `normalize` the weights are
    the softmax over the chosen experts' scores alone, as in gpt-oss (OpenAI 2025, arXiv 2508.10925).
    Differentiable in the weights, not in the choice.

    Args:
      x: [T, D].
      router: with weight [D, E].
      decoder: the model's configuration.
      replay: int [T, A], experts to use instead of the preferred ones (routing replay, Ma et al. 2025, arXiv
        2510.11370); a negative number keeps the preferred one.
    """
    experts = decoder.experts
    assert experts is not None
    scores = layers.einsum("td,de->te", x, router, decoder, "float32").astype(jnp.float32)
    probabilities = jax.nn.sigmoid(scores) if experts.scores == "sigmoid" else jax.nn.softmax(scores)
    preferred = probabilities + router["correction"] if experts.corrected else probabilities
    choices = jax.lax.top_k(jax.lax.stop_gradient(_in_best_groups(preferred, experts)), experts.active)[1]
    used = choices if replay is None else jnp.where(replay < 0, choices, replay.astype(jnp.int32))
    weights = jnp.take_along_axis(probabilities, used, axis=-1)
    if experts.normalize:
        # Sigmoids may all be zero.
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    relative = probabilities / (probabilities.sum(-1, keepdims=True) + 1e-20)
    entropy = jax.scipy.special.entr(relative).sum(-1)
    return Routing(choices, used, weights * experts.scale, entropy)


def _in_best_groups(scores: jax.Array, experts: Experts) -> jax.Array:
    """Replaces the scores of experts outside a token's best groups by -inf. [T, E] -> [T, E]."""
    if experts.active_groups == experts.groups:
        return scores
    by_group = scores.reshape(-1, experts.groups, experts.count // experts.groups)
    best = jax.lax.top_k(by_group, 2)[0].sum(-1)
    chosen = jax.lax.top_k(best, experts.active_groups)[1]
    is_best = (chosen[:, :, None] == jnp.arange(experts.groups)).any(1)
    return jnp.where(is_best[:, :, None], by_group, -jnp.inf).reshape(scores.shape)


def mixture(
    x: jax.Array,
    weights: Params,
    declared: Params,
    decoder: DecoderConfig,
    replay: jax.Array | None = None,
) -> tuple[jax.Array, Routing]:
    """Applies a mixture of experts.

    Args:
      x: [T, D], sharded as `tokens`.
      weights: of one layer, `router` and `EXPERTS`; those of experts [E, inputs, outputs], or `InStack`.
      declared: their declarations, for all layers.
      decoder: the model's configuration.
      replay: as for `route`.

    Returns:
      (out, routing): [T, D], and the choices.
    """
    experts = {name: weights[name] for name in EXPERTS}
    mesh = sharding.mesh_of(x)
    if mesh is None:
        routing = route(x, weights["router"], decoder, replay)
        of_tokens = functools.partial(_of_experts, experts=experts, decoder=decoder)
        return _in_chunks(of_tokens, x, routing, decoder), routing

    def axes(names: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        return sharding.axes_of(mesh, names, shape, decoder.phase)

    tokens, residual = axes(("tokens", None), x.shape)[0], axes(("residual", None), x.shape)[0]
    _, by_expert, _, by_width = axes(declared["gate"]["weight"].axes, declared["gate"]["weight"].shape)
    gathered = tuple(axis for axis in by_expert if axis in tokens)
    rest = residual[len(tokens) :] if residual[: len(tokens)] == tokens else ()
    # Sums are left where the residual stream wants them, if that splits the tokens further.
    scattered = (*gathered, *(rest if set(rest) <= set(by_width) else ()))
    summed = tuple(axis for axis in (*by_expert, *by_width) if axis not in scattered)

    def run(
        x: jax.Array, replay: jax.Array | None, router: layers.Linear, experts: Params
    ) -> tuple[jax.Array, Routing]:
        routing = route(x, router, decoder, replay)

        def of_tokens(x: jax.Array, choices: jax.Array, shares: jax.Array) -> jax.Array:
            first = jax.lax.axis_index(by_expert) * _count(experts) if by_expert else 0
            if gathered:
                x, choices, shares = (
                    jax.lax.all_gather(each, gathered, tiled=True) for each in (x, choices, shares)
                )
            # The devices that share an expert's width sum their parts of its output: one adds the bias.
            adds_bias = not by_width or jax.lax.axis_index(by_width) == 0
            out = _of_experts(x, choices, shares, experts, decoder, first, adds_bias)
            if summed:
                out = jax.lax.psum(out, summed)
            return jax.lax.psum_scatter(out, scattered, tiled=True) if scattered else out

        devices = math.prod(mesh.shape[axis] for axis in gathered)
        parts = math.prod(mesh.shape[axis] for axis in scattered) // devices
        return _in_chunks(of_tokens, x, routing, decoder, devices, parts), routing

    by_tokens = P(tokens or None)
    whole_router = jax.tree.map(lambda _: P(), weights["router"])
    specs = by_tokens, by_tokens, whole_router, _specs(experts, declared, axes)
    out_specs = P((*tokens, *(axis for axis in scattered if axis not in tokens)) or None), by_tokens
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(
        x, replay, weights["router"], experts
    )


def _in_chunks(
    of_tokens: Callable[..., jax.Array],
    x: jax.Array,
    routing: Routing,
    decoder: DecoderConfig,
    devices: int = 1,
    parts: int = 1,
) -> jax.Array:
    """Applies experts to chunks of tokens, so that a device has at most `ROW_BYTES` of their rows at a time.

    The backward pass computes each chunk again.

    Args:
      of_tokens: applied to [t, D], choices [t, A] and weights [t, A]; returns [t / parts, D].
      x: [T, D].
      routing: of the T tokens.
      decoder: the model's configuration.
      devices: number of devices whose tokens are gathered.
      parts: number of devices that the result is split over.

    Returns:
      [T / parts, D], of adjacent tokens.
    """
    assert decoder.experts is not None
    given = x, routing.used, routing.weights
    rows, width = devices * routing.used.size, max(x.shape[1], decoder.experts.mlp_dim)
    least = -(-rows * width * jnp.dtype(decoder.dtype).itemsize // ROW_BYTES)
    each = len(x) // parts
    chunks = next((n for n in range(least, each + 1) if each % n == 0), each)
    if chunks == 1:
        return of_tokens(*given)

    def split(x: jax.Array) -> jax.Array:
        """[T, ...] -> [chunks, T / chunks, ...], where every chunk has tokens of all parts."""
        by_part = x.reshape(parts, chunks, -1, *x.shape[1:])
        return by_part.swapaxes(0, 1).reshape(chunks, -1, *x.shape[1:])

    out = jax.lax.map(lambda chunk: jax.checkpoint(of_tokens)(*chunk), jax.tree.map(split, given))
    return out.reshape(-1, out.shape[-1])


def _count(experts: Params) -> int:
    """Returns the number of experts on a device."""
    weight = experts["gate"]["weight"]
    return weight.weights.shape[1] if isinstance(weight, grouped.InStack) else weight.shape[0]


def _specs(experts: Params, declared: Params, axes: Any) -> Params:
    """Returns the partition specs of the experts' weights and adapters, gathered along `fsdp` in training."""

    def spec(name: str, leaf: str, x: Any) -> Any:
        of_linear = declared[name]
        weight = of_linear["weight"].adapter(1)[leaf] if leaf in ADAPTER else of_linear[leaf]
        names = tuple(None if axis in ("layers", "embed") else axis for axis in weight.axes)
        sharded: list[Any] = [each or None for each in axes(names, weight.shape)]
        whole: Any = P(*sharded)
        layer: Any = P()
        return grouped.InStack(whole, layer) if isinstance(x, grouped.InStack) else P(*sharded[1:])

    return {
        name: {leaf: spec(name, leaf, x) for leaf, x in linear.items()} for name, linear in experts.items()
    }


def _of_experts(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    experts: Params,
    decoder: DecoderConfig,
    first: jax.Array | int = 0,
    adds_bias: jax.Array | bool = True,
) -> jax.Array:
    """Sums the outputs of the experts on this device, which are those from number `first` on.

    `adds_bias` says whether this device adds the biases of `down`. [T, D] -> [T, D], in the dtype of a
    matmul's result.
    """
    count, (tokens, active) = _count(experts), choices.shape
    number = choices.reshape(-1) - first
    number = jnp.where((number >= 0) & (number < count), number, count)  # of another device: last
    order = jnp.argsort(number)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(number[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)

    linear = functools.partial(_linear, sizes=sizes, number=number[order], decoder=decoder)
    rows: Any = _by_expert(active, x, order, inverse)
    hidden = layers.gated(linear(rows, experts["gate"]), linear(rows, experts["up"]), decoder)
    out = linear(hidden, experts["down"], adds_bias=adds_bias)
    each = _by_token(out, order, inverse).reshape(tokens, active, -1)
    return jnp.einsum("tad,ta->td", each.astype(jnp.float32), weights).astype(out.dtype)


def _linear(
    x: jax.Array,
    linear: Any,
    sizes: jax.Array,
    number: jax.Array,
    decoder: DecoderConfig,
    adds_bias: jax.Array | bool = True,
) -> jax.Array:
    """Applies each expert's linear layer, with its adapter and its bias, to its rows.

    `number`, int32 [R], is the expert of each row. [R, inputs] -> [R, outputs].
    """
    out = grouped.product(x, linear["weight"], sizes, decoder, linear.get(SCALE))
    if "lora_a" in linear:
        low = grouped.product(x, linear["lora_a"], sizes, decoder)
        out = out + decoder.lora_scale * grouped.product(low, linear["lora_b"], sizes, decoder)
    if "bias" in linear:
        out = grouped.add_bias(out, linear["bias"], jnp.where(adds_bias, number, len(sizes)))
    return out


# Gathers whose gradients are gathers too: every token is chosen `active` times, and `inverse` says where.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_expert(active: int, x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns a row for each choice, in the order of experts. [T, D] -> [T * A, D]."""
    return x[order // active]


def _by_expert_backward(active: int, inverse: jax.Array, g: jax.Array):
    each = g[inverse].reshape(-1, active, g.shape[1])
    return each.astype(jnp.float32).sum(1).astype(g.dtype), None, None


_by_expert.defvjp(
    lambda active, x, order, inverse: (_by_expert(active, x, order, inverse), inverse), _by_expert_backward
)


@jax.custom_vjp
def _by_token(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Inverts the order of `_by_expert`. [T * A, D] -> [T * A, D], a token's choices side by side."""
    return rows[inverse]


_by_token.defvjp(
    lambda rows, order, inverse: (_by_token(rows, order, inverse), order),
    lambda order, g: (g[order], None, None),
)
