"""Compiles the decode loop of google-tunix's sampler, with its own Qwen3, for a TPU topology.

Run by bench_tpu.py in tunix's environment with a request as JSON on standard input; writes the optimized HLO
to `hlo` and prints memory and seconds as JSON. Weights and caches are sharded as tunix shards them for
sampling. The cache has room only for the filled tokens, because tunix's sampler attends to all of its
columns. The state is donated, unlike in the sampler itself, so that the cache is not copied at the loop's
entry.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

# As espl_jax/plan/tpu_compiler.py does.
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.generate import sampler as sampling
from tunix.models.qwen3 import model as qwen3


class Tokenizer:
    """The part of a tokenizer that a decode step uses."""

    def pad_id(self) -> int:
        """The padding token."""
        return 0


request = json.load(sys.stdin)
described, rows, filled = request["config"], request["rows"], request["filled"]
devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices)
# As many tensor-parallel devices as there are key/value heads; the others split rows and weights.
tensor = math.gcd(devices.size, described["num_key_value_heads"])
mesh = Mesh(devices.reshape(-1, tensor), ("fsdp", "tp"))


def at(*spec: str | None) -> NamedSharding:
    """Returns a sharding on the mesh."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def array(shape: tuple[int, ...], dtype: jnp.dtype, *spec: str | None) -> jax.ShapeDtypeStruct:
    """Returns an abstract array on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at(*spec))


# tunix omits its sharding constraints on activations if the process runs on a CPU.
qwen3.shard = lambda x, spec: jax.lax.with_sharding_constraint(x, at(*spec))
config = qwen3.ModelConfig(
    num_layers=described["num_hidden_layers"],
    vocab_size=described["vocab_size"],
    embed_dim=described["hidden_size"],
    hidden_dim=described["intermediate_size"],
    num_heads=described["num_attention_heads"],
    head_dim=described["head_dim"],
    num_kv_heads=described["num_key_value_heads"],
    rope_theta=described["rope_theta"],
    norm_eps=described["rms_norm_eps"],
    use_tied_embedding=described["tie_word_embeddings"],
    shd_config=qwen3.ShardingConfig.get_default_sharding(is_sampling=True),
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
    num_experts=described.get("num_experts"),
    num_experts_per_tok=described.get("num_experts_per_tok"),
)
model = nnx.eval_shape(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
state = nnx.variables(model)
params = jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(*spec)),
    state,
    nnx.get_partition_spec(state),
)

sampler = object.__new__(sampling.Sampler)  # its constructor needs real arrays
sampler.tokenizer = Tokenizer()
sampler.cache_config = sampling.CacheConfig(filled, config.num_layers, config.num_kv_heads, config.head_dim)
sampler.eos_ids = jnp.array([described["eos_token_id"]])
sampler._transformer_graphdef = nnx.graphdef(model)

keys = array((rows, filled, config.num_kv_heads, config.head_dim), jnp.bfloat16, "fsdp", None, "tp", None)
integer, counts = array((), jnp.int32), array((rows,), jnp.int32)
begun = sampling._SamplingState(
    decoding_step=integer,
    token_buffer=array((rows, filled), jnp.int32),
    positions=array((rows, filled), jnp.int32),
    cache={f"layer_{i}": {"k": keys, "v": keys, "end_index": counts} for i in range(config.num_layers)},
    done=array((rows,), jnp.bool_),
    total_sampling_steps=integer,
    logits_buffer=None,
    logprobs_buffer=array((rows, filled), jnp.float32),
    forbidden_token_ids=None,
    seed=array((2,), jnp.uint32),
    sampling_mode="top_p",
    num_input_tokens=filled,
    temperature=1.0,
    sampling_parameters={"top_p": 1.0, "top_k": None},
)
since = time.time()
leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
compiled = jax.jit(sampler._decode_fn, donate_argnums=(1,)).lower(leaves, begun).compile()
seconds = time.time() - since
Path(request["hlo"]).write_text(compiled.as_text(), encoding="utf-8")
memory = compiled.memory_analysis()
print(
    json.dumps(
        {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "seconds": seconds,
        }
    )
)
