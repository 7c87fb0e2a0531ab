"""A decoder small enough to compile in a second, with functions that are jitted once for all tests."""

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.choices import LORA_TARGETS
from espl_jax.models import int8, lora, transformer
from espl_jax.models.config import DecoderConfig, Rope
from espl_jax.models.params import SCALE, abstract, to_storage
from espl_jax.rl.logprobs import token_logprobs

# The head dimension is not D / N, and the vocabulary a prime, so that no two axes pass for one another.
CONFIG = DecoderConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    rope=Rope(theta=500.0),
    tied_head=True,
    max_positions=256,
    sampling_layout="stacked",  # half as long to compile; some tests sample as CPUs do by default
)

forward = jax.jit(transformer.forward, static_argnames="decoder")
logits = jax.jit(transformer.logits, static_argnames="decoder")
token_logprobs = jax.jit(token_logprobs, static_argnames="decoder")
unembed = jax.jit(transformer.unembed, static_argnames="decoder")


def forward_tree(params, decoder, levels, lengths):
    """All levels of a tree, each over those above: (hidden states of each, their caches)."""
    hidden, caches = [], []
    for tokens, length in zip(levels, lengths, strict=True):
        out, cache, _ = transformer.forward(params, decoder, tokens, length, tuple(caches))
        hidden.append(out)
        caches.append(cache)
    return hidden, caches


jitted_forward_tree = jax.jit(forward_tree, static_argnames="decoder")


def params(config=CONFIG, seed=0):
    """Random params whose norm scales differ from one too; int8 ones are those of float32, rounded."""
    if config.param_dtype == "int8":
        return to_storage(params(config.replace(param_dtype="float32"), seed), config)
    rng = np.random.default_rng(seed)

    def draw(weight):
        mean, deviation = (0.0, weight.fan_in**-0.5) if weight.inputs else (weight.fill, 0.3)
        return jnp.asarray(rng.normal(mean, deviation, weight.shape), weight.dtype)

    return jax.tree.map(draw, abstract(config))


def in_float(params, config):
    """Params whose int8 weights are replaced by the float32 weights that they stand for."""

    def walk(declared, node):
        kept = {
            name: walk(declared[name], child) if isinstance(child, dict) else child
            for name, child in node.items()
            if name != SCALE
        }
        if SCALE in node:
            kept["weight"] = int8.dequantize(node["weight"], node[SCALE], declared["weight"].input_axes)
        return kept

    return walk(abstract(config), params)


def adapters(config=CONFIG, rank=3, seed=1, targets=LORA_TARGETS[:7]):
    """Random adapters in which neither A nor B is zero."""
    rng = np.random.default_rng(seed)
    declared = lora.abstract_adapters(config, rank, targets)
    return jax.tree.map(lambda weight: jnp.asarray(rng.normal(0, 0.3, weight.shape), weight.dtype), declared)


def relative_error(ours, reference):
    """Norm of the difference over that of the reference; 0 for equal arrays, zeros too."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    difference = np.linalg.norm(ours - reference)
    return difference and difference / np.linalg.norm(reference)


def assert_trees_close(ours, reference, tolerance):
    """Every leaf within a relative error."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True
    ):
        error = relative_error(x, y)
        assert error < tolerance, (jax.tree_util.keystr(path), error)
