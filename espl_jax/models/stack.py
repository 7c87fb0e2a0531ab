"""Runs the layers of a stack one after another: scanned or unrolled, and with or without recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from espl_jax.models.attention import ATTENTION
from espl_jax.models.config import DecoderConfig

LAYER_INPUT = "layer_input"
"""Name of the residual stream before a layer, for checkpoint (remat) policies."""


def run_layers(
    layer: Callable[..., Any], decoder: DecoderConfig, windows: Sequence[int], x: jax.Array, stacked: Any
) -> Any:
    """Runs layers, each with its window and slice of `stacked`. Returns x and their stacked outputs."""

    def checkpointed(window: int | None, place: int | None = None) -> Callable[..., Any]:
        """Returns the layer with remat; its window is static, or with None, passed for each layer.

        With a `place`, the layer takes its part of what is given for all layers of a period. It does so
        inside, so that the backward pass keeps what was given, and no copy of a part.
        """
        known = layer if window is None else functools.partial(layer, window=window)
        known = known if place is None else functools.partial(_at, known, place)
        if decoder.remat == "none":
            return known
        if decoder.remat == "rounded":
            return _from_rounded(known, decoder)
        return jax.checkpoint(known, policy=_SAVED[decoder.remat])

    if decoder.scan_layers:
        if len(set(windows)) == 1:
            body = checkpointed(windows[0])
            return jax.lax.scan(lambda x, xs: body(x, *xs), x, stacked)
        period, sampling = _period(windows), decoder.phase == "sampling"
        if period <= LONGEST_PERIOD and (sampling or len(windows) % period == 0):
            if sampling:
                layers = [checkpointed(window) for window in windows[:period]]
                return _scan_in_place(layers, len(windows), x, stacked)
            return _scan_slices([checkpointed(windows[i], i) for i in range(period)], x, stacked)
        body = checkpointed(None)
        return jax.lax.scan(
            lambda x, xs: body(x, *xs[0], window=xs[1]), x, (stacked, jnp.array(windows, jnp.int32))
        )
    unrolled = [checkpointed(window) for window in windows]
    return _in_turn(unrolled, x, lambda i: jax.tree.map(lambda leaf: leaf[i], stacked))


LONGEST_PERIOD = 8
"""Longest pattern of windows whose layers are unrolled, so that the window of each is static. Every layer of
the pattern is compiled."""


def _period(windows: Sequence[int]) -> int:
    """Returns the length of the pattern that the windows repeat, the last time perhaps in part."""
    return next(n for n in range(1, len(windows) + 1) if windows[n:] == windows[:-n])


def _at(layer: Callable[..., Any], place: int, x: jax.Array, *given: Any) -> Any:
    """Runs a layer with its part of what is given for all layers of a period."""
    return layer(x, *jax.tree.map(lambda leaf: leaf[place], given))


def _scan_slices(period: Sequence[Callable[..., Any]], x: jax.Array, stacked: Any) -> Any:
    """Runs the layers of `period` over and over, in a scan over slices of `stacked`."""

    def run(x: jax.Array, given: Any) -> Any:
        return _in_turn(period, x, lambda _: given)

    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, len(period), *leaf.shape[1:]), stacked)
    return _flattened(*jax.lax.scan(run, x, grouped))


def _scan_in_place(period: Sequence[Callable[..., Any]], count: int, x: jax.Array, stacked: Any) -> Any:
    """Runs `count` layers that repeat those of `period`, which read their slices of `stacked` in place.

    A scan over slices would need a copy of those before an incomplete last period. Not for gradients, whose
    sums over layers would be as large as `stacked`.
    """

    def run(x: jax.Array, first: jax.Array | int, layers: Sequence[Callable[..., Any]]) -> Any:
        def read(i: int) -> Any:
            return jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, first + i, keepdims=False), stacked
            )

        return _in_turn(layers, x, read)

    whole, rest = divmod(count, len(period))
    numbers = jnp.arange(whole) * len(period)
    x, written = _flattened(*jax.lax.scan(lambda x, first: run(x, first, period), x, numbers))
    if rest:
        x, last = run(x, whole * len(period), period[:rest])
        written = jax.tree.map(lambda *parts: jnp.concatenate(parts), written, last)
    return x, written


def _in_turn(layers: Sequence[Callable[..., Any]], x: jax.Array, read: Callable[[int], Any]) -> Any:
    """Runs layers one after another, with what `read` returns for each. Returns x and the stacked outputs."""
    written = []
    for i, layer in enumerate(layers):
        x, new = layer(x, *read(i))
        written.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)


def _flattened(x: jax.Array, written: Any) -> Any:
    """Joins the outputs of periods: [periods, layers, ...] -> [periods * layers, ...]."""
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), written)


_SAVED = {
    "full": None,
    "products": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _from_rounded(layer: Callable[..., Any], decoder: DecoderConfig) -> Callable[..., Any]:
    """Wraps a layer so that its backward pass recomputes it from its input, rounded to `decoder.dtype`."""

    def run(x: jax.Array, *given: Any, **window: jax.Array) -> Any:
        # A custom_vjp function cannot close over traced values, so these become arguments.
        jaxpr, shapes = jax.make_jaxpr(layer, return_shape=True)(x, *given, **window)

        def known(closed_over: Any, x: jax.Array, rest: Any) -> Any:
            out = jax.core.eval_jaxpr(jaxpr.jaxpr, closed_over, *jax.tree.leaves((x, rest)))
            return jax.tree.unflatten(jax.tree.structure(shapes), out)

        def forward(closed_over: Any, x: jax.Array, rest: Any) -> Any:
            return known(closed_over, x, rest), (closed_over, x.astype(decoder.dtype), rest)

        def backward(stored: Any, cotangents: Any) -> Any:
            # Without scan, the compiler would otherwise keep the forward pass's values instead of
            # recomputing.
            closed_over, x, rest = jax.lax.optimization_barrier(stored)
            return jax.vjp(known, closed_over, x.astype(jnp.float32), rest)[1](cotangents)

        recomputed = jax.custom_vjp(known)
        recomputed.defvjp(forward, backward)
        return recomputed(jaxpr.consts, x, (given, window))

    return run
