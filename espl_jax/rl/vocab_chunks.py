"""The output head a chunk of its columns at a time, so that logits of many tokens never exist all at once.

A chunk takes as many columns of each part of the vocabulary as lie on devices of their own: the head's weight
[V, D] is seen as [parts, V / parts, D], and a chunk is a slice of the second axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from espl_jax.models import layers
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import Weight, abstract, head
from espl_jax.parallel import sharding

LARGEST = 8192
"""Most columns of a chunk for each device along `tensor`."""

SCORES = 2**24
"""Scores of a chunk that a device holds at most: with many tokens, chunks have fewer columns."""

_VOCAB_AXIS = {"weight": 0, "lora_b": 1}


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How a vocabulary is cut up. The last chunk may reach back over columns already seen.

    Attributes:
      parts: into how many the vocabulary lies.
      each: columns of a part.
      size: columns of a chunk in each part.
    """

    parts: int
    each: int
    size: int

    @property
    def firsts(self) -> jax.Array:
        """int32 [chunks], what the other methods call `first`: the first new column of each chunk."""
        return jnp.arange(0, self.each, self.size)

    def columns(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of a chunk's columns, int32 [C] the tokens they belong to, and bool [C] which are new."""
        columns = self._start(first) + jnp.arange(self.size)
        offsets = self.each * jnp.arange(self.parts)[:, None]
        return (offsets + columns).reshape(-1), jnp.tile(columns >= first, self.parts)

    def cut(self, linear: layers.Linear, first: jax.Array) -> layers.Linear:
        """The head with a chunk's columns alone."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            shape = x.shape
            x = jax.lax.dynamic_slice_in_dim(self._split(x, axis), self._start(first), self.size, axis + 1)
            return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return {name: cut(x, _VOCAB_AXIS[name]) if name in _VOCAB_AXIS else x for name, x in linear.items()}

    def add(self, total: layers.Linear, part: layers.Linear, first: jax.Array) -> layers.Linear:
        """A gradient like the head's, with that of a chunk added in its place."""

        def add(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            split, start = self._split(x, axis), self._start(first)
            new = self._split(new, axis) + jax.lax.dynamic_slice_in_dim(split, start, self.size, axis + 1)
            return jax.lax.dynamic_update_slice_in_dim(split, new, start, axis + 1).reshape(x.shape)

        return {
            name: add(x, part[name], _VOCAB_AXIS[name]) if name in _VOCAB_AXIS else x + part[name]
            for name, x in total.items()
        }

    def _start(self, first: jax.Array) -> jax.Array:
        return jnp.minimum(first, self.each - self.size)

    def _split(self, x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], self.parts, -1, *x.shape[axis + 1 :])


def chunks(linear: layers.Linear, tokens: int) -> Chunks:
    """Chunks of this head for so many tokens, those of all devices together."""
    vocab, mesh = linear["weight"].shape[0], sharding.mesh_of(linear["weight"])
    tensor = fsdp = rows = 1
    if mesh is not None:
        tensor, fsdp, rows = mesh.shape["tensor"], mesh.shape["fsdp"], sharding.row_shards(mesh)
    # Parts that are slices of all devices' shares in both phases, or as nearly as the vocabulary divides.
    parts = next(parts for parts in (tensor * fsdp, tensor, 1) if vocab % parts == 0)
    wanted = min(LARGEST, max(256, SCORES * rows // tokens)) * tensor // parts
    return Chunks(parts, vocab // parts, min(max(1, wanted), vocab // parts))


def scores(flat: jax.Array, linear: layers.Linear, temperature: Any, config: DecoderConfig) -> jax.Array:
    """Logits over temperature, float32 [tokens, C], of flat [tokens, D] and a chunk of the head."""
    weight = sharding.gather(layers.rounded(linear["weight"], config), axes(config))
    out = layers.einsum("td,vd->tv", flat, linear | {"weight": weight}, config, "float32") / temperature
    return sharding.constrain(out, ("tokens", "vocab"), config.phase)


def axes(config: DecoderConfig) -> tuple[str, ...]:
    """Logical axes of the head's weight."""
    return cast(Weight, head(abstract(config))["weight"]).axes
