import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import lora
from espl_jax.models.transformer import unembed
from espl_jax.rl import logprobs
from espl_jax.rl.logprobs import target_logprobs, token_kl, token_logprobs
from tests import tiny

CONFIG = tiny.CONFIG.replace(tied_head=False, lora_scale=0.5)
TOKENS = 13  # unlike any other size
TEMPERATURE = 0.7


def policy(seed):
    """Params of which the head alone matters, its weight carrying an adapter."""
    return lora.attach(tiny.params(CONFIG, seed), tiny.adapters(CONFIG, seed=seed, targets=("head",)))


def with_head(head):
    """Params of which nothing but the head is read."""
    return {"embedding": None, "head": head}


def hidden_states(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(TOKENS, CONFIG.embed_dim)) * 2, jnp.float32)


TARGETS = jnp.asarray(np.random.default_rng(5).integers(0, CONFIG.vocab_size, TOKENS), jnp.int32)
# A vocabulary of 61: larger than it, its divisor, not a divisor, one less, and a single column left over.
CHUNKS = [8192, 61, 16, 60, 20]


def direct(head, hidden, temperature=TEMPERATURE):
    """Log-softmax over the whole vocabulary."""
    return jax.nn.log_softmax(unembed(with_head(head), CONFIG, hidden) / temperature)


def statistics(head, hidden):
    return target_logprobs(with_head(head), CONFIG, hidden, TARGETS, TEMPERATURE)


def direct_statistics(head, hidden):
    scores = direct(head, hidden)
    entropy = -(jnp.exp(scores) * scores).sum(axis=-1)
    return jnp.take_along_axis(scores, TARGETS[:, None], axis=-1)[:, 0], entropy


def weighted(function):
    """A scalar in which every output counts differently, so that its gradient shows all of them."""
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(2, TOKENS)), jnp.float32)
    return lambda *x: sum((w * out).sum() for w, out in zip(weights, function(*x), strict=False))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logprobs_and_entropy(monkeypatch, chunk):
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    for ours, expected in zip(statistics(*arguments), direct_statistics(*arguments), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [20, 61])
def test_gradients_of_logprobs_and_entropy(monkeypatch, chunk):
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    ours = jax.jit(jax.grad(weighted(statistics), argnums=(0, 1)))(*arguments)
    expected = jax.jit(jax.grad(weighted(direct_statistics), argnums=(0, 1)))(*arguments)
    tiny.assert_trees_close(ours, expected, 1e-5)


def kl(head, hidden):
    reference = tiny.params(CONFIG, 3)
    return [token_kl(with_head(head), hidden, reference, hidden_states(4), CONFIG, TEMPERATURE)]


def direct_kl(head, hidden):
    ours, theirs = direct(head, hidden), direct(tiny.params(CONFIG, 3)["head"], hidden_states(4))
    return [(jnp.exp(ours) * (ours - theirs)).sum(axis=-1)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_kl(monkeypatch, chunk):
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    (ours,), (expected,) = kl(*arguments), direct_kl(*arguments)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert (ours > 0).all()
    same = token_kl(policy(0), hidden_states(1), policy(0), hidden_states(1), CONFIG)
    np.testing.assert_allclose(same, 0, atol=1e-5)


def test_gradient_of_kl(monkeypatch):
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", 20)
    arguments = policy(0)["head"], hidden_states(1)
    ours = jax.jit(jax.grad(weighted(kl), argnums=(0, 1)))(*arguments)
    expected = jax.jit(jax.grad(weighted(direct_kl), argnums=(0, 1)))(*arguments)
    tiny.assert_trees_close(ours, expected, 1e-5)


def test_extreme_scores_stay_finite(monkeypatch):
    """A chunk in which every score is far below the largest, and one far above all before it."""
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", 20)
    head = {"weight": jnp.zeros((61, 16)).at[:20, 0].set(-300.0).at[45, 0].set(300.0)}
    hidden = jnp.zeros((TOKENS, 16)).at[:, 0].set(1.0)
    stats = target_logprobs(with_head(head), CONFIG, hidden, jnp.full(TOKENS, 45))
    np.testing.assert_array_equal(stats.logprobs, 0)
    np.testing.assert_array_equal(stats.entropy, 0)
    stats = target_logprobs(with_head(head), CONFIG, hidden, jnp.full(TOKENS, 3))
    np.testing.assert_array_equal(stats.logprobs, -600)
    grads = jax.grad(lambda h: target_logprobs(with_head(head), CONFIG, h, TARGETS).logprobs.sum())(hidden)
    assert np.isfinite(grads).all()


def test_token_logprobs_of_plain_sequences():
    params = lora.attach(tiny.params(CONFIG), tiny.adapters(CONFIG))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    expected = jax.nn.log_softmax(tiny.logits(params, CONFIG, tokens) / 0.5)[:, :-1]
    expected = np.take_along_axis(np.asarray(expected), tokens[:, 1:, None], axis=-1)[..., 0]
    ours = token_logprobs(params, CONFIG, tokens, 0.5)
    assert ours.shape == (2, 8)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def whole_vocabulary(function, *arguments):
    """Shapes [tokens, vocabulary] in the compiled gradient of a function."""
    compiled = jax.jit(jax.grad(weighted(function), argnums=(0, 1))).lower(*arguments).compile()
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    return {s for s in shapes if {str(TOKENS), str(CONFIG.vocab_size)} <= set(s.split(","))}


def test_the_whole_vocabulary_never_exists(monkeypatch):
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", 20)
    arguments = policy(0)["head"], hidden_states(1)
    assert whole_vocabulary(statistics, *arguments) == set()
    assert whole_vocabulary(kl, *arguments) == set()
    assert whole_vocabulary(direct_statistics, *arguments)  # the search finds it where it is
