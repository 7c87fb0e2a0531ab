"""Abstract arguments of our programs on a mesh: shapes, dtypes and shardings, nothing allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from espl_jax.models.attention import KVCache
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.run.weights import abstract_trainable
from espl_jax.sampling import decode
from espl_jax.training.batches import abstract_batch
from espl_jax.training.state import TrainState, abstract_train_state
from espl_jax.training.step import place_batch
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


MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": qwen3(64, 5120, 25600, 64, False),
    "qwen3-30b-a3b": qwen3(48, 2048, 6144, 32, False)
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "gpt-oss-120b": {"model_type": "gpt_oss", "eos_token_id": 200002},
    "deepseek-v3.1": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 163840,
        "eos_token_id": 1,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "eos_token_id": 128009,
    },
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Abstract arguments of our programs, placed as a run places its arrays."""

    config: DecoderConfig
    mesh: Mesh

    def sampling(self) -> DecoderConfig:
        """Returns the configuration of the sampling phase."""
        return self.config.replace(phase="sampling")

    def array(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...] = ()) -> Any:
        """Returns an array, sharded by the given logical axes and otherwise replicated."""
        axes = axes + (None,) * (len(shape) - len(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(self.mesh, axes, shape))

    def params(self) -> Any:
        """Returns the decoder's weights in the sampling phase."""
        declared = abstract(self.config)
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(w.dtype)), declared)
        return sharding.place(shapes, declared, self.mesh, "sampling")

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

    def train_batch(self, rows: int, tokens: int, microbatch_rows: int) -> TrainBatch:
        """One system prompt of 1,024 tokens, problems of 129, groups of 4 rollouts; truncated sampling."""
        levels = {"system_tokens": 1024, "problem_tokens": 129, "new_tokens": tokens, "cutoffs": True}
        return self._batch(1, rows // 4, 4, microbatch_rows=microbatch_rows, **levels)

    def tree_batch(
        self, prompts: int, problems: int, group: int, system: int, problem: int, new: int
    ) -> TrainBatch:
        """Rollouts of all problems under all system prompts, lengths not rounded up."""
        levels = {"system_tokens": system, "problem_tokens": problem, "new_tokens": new, "cutoffs": False}
        batch = self._batch(prompts, prompts * problems, group, **levels)
        return self._exact(batch, system, problem - 1, new)

    def flat_batch(self, rows: int, tokens: int) -> TrainBatch:
        """Returns a batch of sequences without shared prefixes, lengths not rounded up."""
        levels = {"system_tokens": 0, "problem_tokens": 0, "new_tokens": tokens, "cutoffs": False}
        return self._exact(self._batch(1, rows, 1, **levels), 0, 0, tokens)

    def _batch(self, prompts: int, groups: int, group: int, **fields: Any) -> TrainBatch:
        shards = sharding.row_shards(self.mesh)
        batch = abstract_batch(prompts=prompts, groups=groups, group_size=group, shards=shards, **fields)
        return place_batch(batch, self.mesh)

    def _exact(self, batch: TrainBatch, system: int, problem: int, new: int) -> TrainBatch:
        columns = {"system_tokens": system, "problem_tokens": problem}
        columns |= dict.fromkeys(("inputs", "targets", "mask", "sampler_logprobs"), new)

        def cut(x: jax.ShapeDtypeStruct, width: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*x.shape[:-1], width), x.dtype, sharding=x.sharding)

        return batch._replace(**{name: cut(getattr(batch, name), width) for name, width in columns.items()})

    def train_state(self, config: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """What a run of this ConfigDict trains, and Adam's averages of it."""
        trainable = abstract_trainable(config, self.config, self.mesh)
        return abstract_train_state(trainable, optimizer, self.mesh)

    def weight_bytes(self, with_head: bool) -> int:
        """Returns the bytes per device of the weights that a program reads (embeddings only as a head)."""
        params = self.params()
        embedding = params.pop("embedding")
        head = params.pop("head", embedding)
        return bytes_per_device((params, head) if with_head else params)
