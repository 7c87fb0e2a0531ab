"""Abstract arguments of our programs on a mesh: shapes, dtypes and shardings, nothing allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax import sharding
from espl_jax.assemble import abstract_trainable
from espl_jax.memory import bytes_per_device
from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.transformer import abstract
from espl_jax.sampling import decode
from espl_jax.train_step import TrainState, abstract_train_state
from espl_jax.types import TrainBatch

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}


def qwen3(layers: int, embed: int, mlp: int, heads: int, tied: bool) -> dict[str, Any]:
    """A Qwen3's config.json."""
    return QWEN3 | {
        "num_hidden_layers": layers,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "qwen3-0.6b": qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": qwen3(40, 5120, 17408, 40, False),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Abstract arguments of our programs, placed as a run places its arrays."""

    config: DecoderConfig
    mesh: Mesh

    def array(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...] = ()) -> Any:
        """One array, whole on every device but for the logical axes given."""
        axes = axes + (None,) * (len(shape) - len(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(self.mesh, axes, shape))

    def place(self, declared: Any) -> Any:
        """Weights as declared."""
        return jax.tree.map(lambda w: self.array(w.shape, jnp.dtype(w.dtype), w.axes), declared)

    def params(self) -> Any:
        """The decoder's weights."""
        return self.place(abstract(self.config))

    def keys_and_values(self, nodes: int, capacity: int, everywhere: bool) -> tuple[Any, Any]:
        """Keys [L, K, A, H, C] and values [L, K, A, C, H]."""
        return decode.abstract_slots(self.config, nodes, capacity, self.mesh, everywhere)

    def shared_level(self, nodes: int, capacity: int) -> KVCache:
        """The cache of a level that rows share."""
        integers = self.array((nodes,), jnp.int32)
        return KVCache(*self.keys_and_values(nodes, capacity, everywhere=True), integers, integers)

    def rows(self, count: int) -> decode.Rows:
        """Rows in flight."""
        return decode.abstract_rows(count, self.mesh)

    def train_batch(self, rows: int, tokens: int) -> TrainBatch:
        """One system prompt of 1,024 tokens, problems of 128, groups of 4 rollouts."""
        shape = (1, rows // 4, 4)
        columns = (*shape, tokens)
        batch = TrainBatch(
            system_tokens=self.array((1, 1024), jnp.int32),
            system_lengths=self.array((1,), jnp.int32),
            problem_tokens=self.array((*shape[:2], 128), jnp.int32),
            problem_lengths=self.array(shape[:2], jnp.int32),
            inputs=self.array(columns, jnp.int32),
            targets=self.array(columns, jnp.int32),
            mask=self.array(columns, jnp.bool_),
            sampler_logprobs=self.array(columns, jnp.float32),
            cutoffs=self.array(columns, jnp.float32),
            advantages=self.array(shape, jnp.float32),
            num_rollouts=self.array((), jnp.float32),
        )
        return sharding.place_batch(batch, self.mesh)

    def train_state(self, config: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """What a run of this ConfigDict trains, and Adam's averages of it."""
        trainable = abstract_trainable(config, self.config, self.mesh)
        return abstract_train_state(trainable, optimizer, self.mesh)

    def weight_bytes(self, with_head: bool) -> int:
        """Weights that a program uses whole, on one device: embeddings only where they are the head."""
        params = self.params()
        embedding = params.pop("embedding")
        head = params.pop("head", embedding)
        return bytes_per_device((params, head) if with_head else params)
