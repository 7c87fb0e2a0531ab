"""Every family against transformers and torch, on randomly drawn tiny models, in float32.

`pytest tests/models/families_test.py --family-seed=7 --family-draws=20` draws other ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from espl_jax.choices import REMATS
from espl_jax.models import transformer
from espl_jax.models.attention import KVCache
from espl_jax.models.transformer import forward
from espl_jax.rl.logprobs import target_logprobs
from tests.support import families, ragged_tree, tiny

QUICKLY = {"xla_backend_optimization_level": 0}  # compiling is nearly all that these tests do
run, run_tree, logits, unembed = (
    jax.jit(f, static_argnames="decoder", compiler_options=QUICKLY)
    for f in (forward, tiny.forward_tree, transformer.logits, transformer.unembed)
)

SHAPE, WIDTHS = (2, 3, 2), (15, 11, 13)  # of the trees, longer than any window


FAST = {"llama": 0, "mistral": 1, "qwen2": 3, "qwen3": 2, "gemma3": 3, "qwen3_moe": 1, "gpt_oss": 1} | {
    "deepseek_v3": 1
}
"""One of the five draws of each family. Together they show all scalings of RoPE, tied and untied heads,
windows, scanned and unrolled layers, and four ways of recomputing. The others are slow tests."""


def pytest_generate_tests(metafunc):
    seed, draws = (metafunc.config.getoption(f"family_{name}") for name in ("seed", "draws"))
    fast = FAST
    if metafunc.function.__name__ == "test_gradients_of_token_logprobs":
        # Latent attention has gradients in latent_test; the other families have no mechanism that these lack.
        fast = {family: FAST[family] for family in ("gemma3", "qwen3_moe", "gpt_oss")}
    cases = []
    for family in families.FAMILIES:
        for number in range(seed, seed + (draws or 5)):
            slow = draws is None and number - seed != fast.get(family)
            marks = [pytest.mark.slow] if slow else []
            cases.append(pytest.param((family, number), id=f"{family}-{number}", marks=marks))
    metafunc.parametrize("case", cases, scope="module")


@pytest.fixture(scope="module")
def case_parts(case):
    family, seed = case
    hf_config = families.draw_hf_config(family, seed)
    model = families.torch_model(hf_config, seed)
    config = families.our_config(hf_config, scan_layers=bool(seed % 2), remat=REMATS[seed % 5])
    return model, config, families.our_params(model, config), seed


def levels_of(batch):
    levels = (batch.system_tokens, batch.problem_tokens, batch.inputs)
    lengths = (batch.system_lengths, batch.problem_lengths, batch.mask.sum(-1))
    return tuple(x.reshape(-1, x.shape[-1]) for x in levels), tuple(x.reshape(-1) for x in lengths)


@pytest.fixture
def close(record_property):
    """Asserts that logits are within 1e-4 of the largest one, and keeps how near they were."""

    def check(ours, expected, name):
        expected = np.asarray(expected)
        error = float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())
        record_property(name, error)
        assert error < 1e-4

    return check


def test_flat_tree_and_cached_logits(case_parts, close):
    model, config, params, seed = case_parts
    batch = ragged_tree.random_tree(seed, config.vocab_size, SHAPE, WIDTHS)
    flat = ragged_tree.flatten(batch)
    tokens = np.pad(flat.tokens, ((0, 0), (0, families.LENGTH - flat.tokens.shape[1])))
    with torch.no_grad():
        expected = families.torch_logits(model, tokens).numpy()
    close(logits(params, config, tokens), expected, "flat")

    # The tree, as the policy gradient runs it.
    levels, lengths = levels_of(batch)
    hidden, caches = run_tree(params, config, levels, lengths)
    real = np.arange(levels[2].shape[1]) < lengths[2][:, None]
    wanted = ragged_tree.pick(expected, batch)
    close(np.asarray(unembed(params, config, hidden[2]))[real], wanted[real], "tree")

    # Token by token over the caches, as sampling runs it.
    rows, steps = levels[2].shape
    heads, *widths = config.cache_shape
    shapes = [(config.num_layers, heads, rows, steps, width) for width in widths]
    key, value = np.zeros(shapes[0], np.float32).swapaxes(3, 4), np.zeros(shapes[1], np.float32)
    decoded = np.zeros(wanted.shape, np.float32)
    for t in range(steps):
        own = KVCache(key, value, caches[2].start, np.full(rows, t, np.int32))
        h, fresh, _ = run(params, config, levels[2][:, t : t + 1], ancestors=(*caches[:2], own))
        decoded[:, t] = unembed(params, config, h[:, 0])
        key[..., t], value[:, :, :, t] = fresh.key[..., 0], fresh.value[:, :, :, 0]
    close(decoded[real], wanted[real], "decode")


def test_gradients_of_token_logprobs(case_parts, record_property):
    """Of the summed logprobs of a tree's rollouts, in every weight; torch has them as plain sequences."""
    model, config, params, seed = case_parts
    batch = ragged_tree.random_tree(seed, config.vocab_size, SHAPE, WIDTHS)
    levels, lengths = levels_of(batch)
    targets, mask = (x.reshape(levels[2].shape) for x in (batch.targets, batch.mask))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    @jax.grad
    def ours(params):
        hidden, _ = tiny.forward_tree(params, config, levels, lengths)
        return jnp.where(mask, target_logprobs(params, config, hidden[2], targets).logprobs, 0.0).sum()

    flat = ragged_tree.flatten(batch)
    rows, steps = np.nonzero(mask)
    scores = torch.log_softmax(families.torch_logits(model, flat.tokens), -1)[rows, flat.starts[rows] + steps]
    model.zero_grad()
    scores.gather(-1, torch.tensor(targets[mask][:, None], dtype=torch.long)).sum().backward()
    expected = families.each_expert(families.gradients_of(model))

    grads = families.by_hf_names(ours(params), config)
    assert set(grads) == set(expected)
    errors = {name: tiny.relative_error(grads[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.get)
    record_property("gradient", float(errors[worst]))
    assert errors[worst] < 1e-3, worst
