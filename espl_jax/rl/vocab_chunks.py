"""Splits the output head into vocabulary chunks, so that the logits of many tokens never exist at once.

The vocabulary may be sharded. To keep all devices busy, a chunk takes the same number of columns from every
shard: the head's weight [V, D] is viewed as [parts, V / parts, D], and a chunk is a slice of the second axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from espl_jax.models import layers
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import SCALE, Weight, abstract
from espl_jax.models.transformer import head
from espl_jax.parallel import sharding

LARGEST = 8192
"""Most columns of a chunk per device along the mesh axis `tensor`."""

SCORES = 2**24
"""Most scores of a chunk that a device holds; with many tokens, chunks get fewer columns."""

_VOCAB_AXIS = {"weight": 0, SCALE: 0, "lora_b": 1}


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A split of the vocabulary into chunks. The last chunk may overlap the one before it.

    Attributes:
      parts: number of parts, see the module docstring.
      each: columns of a part.
      size: columns that a chunk takes from each part.
    """

    parts: int
    each: int
    size: int

    @property
    def firsts(self) -> jax.Array:
        """int32 [chunks], the first new column of each chunk within a part (`first` in the other methods)."""
        return jnp.arange(0, self.each, self.size)

    def columns(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the token ids of a chunk's columns, int32 [C], and which columns are new, bool [C]."""
        columns = self._start(first) + jnp.arange(self.size)
        offsets = self.each * jnp.arange(self.parts)[:, None]
        return (offsets + columns).reshape(-1), jnp.tile(columns >= first, self.parts)

    def cut(self, linear: layers.Linear, first: jax.Array) -> layers.Linear:
        """Returns the head restricted to the columns of a chunk."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            shape = x.shape
            x = jax.lax.dynamic_slice_in_dim(self._split(x, axis), self._start(first), self.size, axis + 1)
            return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return {name: cut(x, _VOCAB_AXIS[name]) if name in _VOCAB_AXIS else x for name, x in linear.items()}

    def add(self, total: layers.Linear, part: layers.Linear, first: jax.Array) -> layers.Linear:
        """Returns `total`, a gradient of the head, plus `part`, the gradient of one chunk's columns."""

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
    """Returns the chunks of this head for `tokens` tokens, counted over all devices."""
    vocab, mesh = linear["weight"].shape[0], sharding.mesh_of(linear["weight"])
    tensor = fsdp = rows = 1
    if mesh is not None:
        tensor, fsdp, rows = mesh.shape["tensor"], mesh.shape["fsdp"], sharding.row_shards(mesh)
    # As many parts as the vocabulary has shards in either phase, if that divides the vocabulary.
    parts = next(parts for parts in (tensor * fsdp, tensor, 1) if vocab % parts == 0)
    wanted = min(LARGEST, max(256, SCORES * rows // tokens)) * tensor // parts
    return Chunks(parts, vocab // parts, min(max(1, wanted), vocab // parts))


def scores(flat: jax.Array, linear: layers.Linear, temperature: Any, decoder: DecoderConfig) -> jax.Array:
    """Returns logits / temperature, float32 [tokens, C], of flat [tokens, D] and a chunk of the head."""
    weight = sharding.gather(layers.rounded(linear["weight"], decoder), axes(decoder))
    out = layers.einsum("td,vd->tv", flat, linear | {"weight": weight}, decoder, "float32") / temperature
    return sharding.constrain(out, ("tokens", "vocab"), decoder.phase)


def axes(decoder: DecoderConfig) -> tuple[str, ...]:
    """Returns the logical axes of the head's weight."""
    return cast(Weight, head(abstract(decoder))["weight"]).axes
