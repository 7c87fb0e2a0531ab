import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espl_jax.models import int8, lora
from espl_jax.models.transformer import unembed
from espl_jax.rl import vocab_chunks
from espl_jax.rl.logprobs import target_logprobs, token_kl, token_logprobs
from espl_jax.sampling.draw import draw
from espl_jax.sampling.truncation import Truncation
from tests.support import tiny

CONFIG = tiny.CONFIG.replace(tied_head=False, lora_scale=0.5)
TOKENS = 13  # unlike any other size
TEMPERATURE = 0.7


def policy(seed):
    """Params of which only the head is used, with an adapter on its weight."""
    return lora.attach(tiny.params(CONFIG, seed), tiny.adapters(CONFIG, seed=seed, targets=("head",)))


def with_head(head):
    """Params of which only the head is used."""
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
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    stats = statistics(*arguments)
    for ours, expected in zip(stats, direct_statistics(*arguments), strict=False):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(stats.untruncated, stats.logprobs)
    assert not stats.cut.any()


@pytest.mark.parametrize("chunk", [20, 61])
def test_gradients_of_logprobs(monkeypatch, chunk):
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    ours, expected = (
        jax.jit(jax.grad(weighted(lambda *a, f=f: f(*a)[:1]), argnums=(0, 1)))(*arguments)
        for f in (statistics, direct_statistics)
    )
    tiny.assert_trees_close(ours, expected, 1e-5)


def cutoffs_of(head, hidden):
    """Between the logprobs of the k-th and the next most likely token, with k unlike from token to token."""
    ordered = -np.sort(-np.asarray(direct(head, hidden)), axis=-1)
    kept, rows = np.arange(TOKENS) * 3 + 1, np.arange(TOKENS)
    return jnp.asarray((ordered[rows, kept - 1] + ordered[rows, kept]) / 2)


def truncated_statistics(head, hidden, cutoffs):
    return target_logprobs(with_head(head), CONFIG, hidden, TARGETS, TEMPERATURE, cutoffs)


def direct_truncated(head, hidden, cutoffs):
    """Logprobs renormalized over the kept tokens and the target, by a log-softmax with the others at -inf."""
    scores = direct(head, hidden)
    kept = (scores >= cutoffs[:, None]) | (jnp.arange(CONFIG.vocab_size) == TARGETS[:, None])
    logprobs = jax.nn.log_softmax(jnp.where(kept, scores, -jnp.inf))
    return [jnp.take_along_axis(logprobs, TARGETS[:, None], axis=-1)[:, 0]]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_truncated_logprobs(monkeypatch, chunk):
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    cutoffs = cutoffs_of(*arguments)
    stats = truncated_statistics(*arguments, cutoffs)
    np.testing.assert_allclose(stats.logprobs, direct_truncated(*arguments, cutoffs)[0], atol=1e-5)
    own, entropy = direct_statistics(*arguments)
    np.testing.assert_allclose(stats.untruncated, own, atol=1e-5)
    np.testing.assert_allclose(stats.entropy, entropy, atol=1e-5)
    np.testing.assert_array_equal(stats.cut, own < cutoffs)
    assert stats.cut.any() and not stats.cut.all()


@pytest.mark.parametrize("chunk", [20, 61])
def test_gradient_of_truncated_logprobs(monkeypatch, chunk):
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    arguments = *arguments, cutoffs_of(*arguments)
    ours = jax.jit(jax.grad(weighted(lambda *x: truncated_statistics(*x)[:1]), argnums=(0, 1)))(*arguments)
    expected = jax.jit(jax.grad(weighted(direct_truncated), argnums=(0, 1)))(*arguments)
    tiny.assert_trees_close(ours, expected, 1e-5)


@pytest.mark.parametrize("chunk", [20, 61])
def test_an_int8_head(monkeypatch, chunk):
    """Statistics, and the gradient in the adapter and the hidden states; the head itself has none."""
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    head, hidden = policy(0)["head"], hidden_states(1)
    values, scale = int8.quantize(head["weight"], (-1,))
    frozen = {"weight": values, "weight_scale": scale}
    wide = {"weight": int8.dequantize(values, scale, (-1,))}
    adapter = {name: head[name] for name in ("lora_a", "lora_b")}
    cutoffs = cutoffs_of(wide | adapter, hidden)

    def both(base):
        def out(adapter, hidden):
            stats = truncated_statistics(base | adapter, hidden, cutoffs)
            return weighted(lambda: stats[:1])(), stats

        return jax.jit(jax.value_and_grad(out, argnums=(0, 1), has_aux=True))(adapter, hidden)

    (_, stats), grads = both(frozen)
    (_, wanted), wanted_grads = both(wide)
    tiny.assert_trees_close(stats, wanted, 1e-5)
    tiny.assert_trees_close(grads, wanted_grads, 1e-5)


def test_cutoffs_that_cut_nothing_change_nothing(monkeypatch):
    monkeypatch.setattr(vocab_chunks, "LARGEST", 20)
    head, hidden = policy(0)["head"], hidden_states(1)

    everything = jnp.full(TOKENS, -jnp.inf)
    for ours, expected in zip(
        truncated_statistics(head, hidden, everything), statistics(head, hidden), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    ours, expected = (
        jax.grad(weighted(lambda *x, c=c: truncated_statistics(*x, c)[:1]), argnums=(0, 1))(head, hidden)
        for c in (everything, None)
    )
    tiny.assert_trees_close(ours, expected, 1e-5)


def test_a_target_that_alone_is_kept_is_certain(monkeypatch):
    """Whether it is the most likely token or far less likely than float32 probabilities go."""
    monkeypatch.setattr(vocab_chunks, "LARGEST", 20)
    head = {"weight": jnp.zeros((61, 16)).at[:20, 0].set(-300.0).at[45, 0].set(300.0)}
    hidden = jnp.zeros((TOKENS, 16)).at[:, 0].set(1.0)
    for target, cutoff, cut in ((45, -1.0, False), (3, 1.0, True)):
        targets, cutoffs = jnp.full(TOKENS, target), jnp.full(TOKENS, cutoff)

        def stats(hidden, targets=targets, cutoffs=cutoffs):
            return target_logprobs(with_head(head), CONFIG, hidden, targets, 1.0, cutoffs)

        np.testing.assert_array_equal(stats(hidden).logprobs, 0)
        assert (stats(hidden).cut == cut).all()
        np.testing.assert_array_equal(jax.grad(lambda h: stats(h).logprobs.sum())(hidden), 0)


@pytest.mark.parametrize("truncation", [Truncation(top_p=0.9), Truncation(top_k=5), Truncation(min_p=0.1)])
def test_the_samplers_cutoffs_survive_rounding(truncation):
    """With slightly perturbed hidden states, all sampled tokens are kept, with nearly the same logprobs."""
    head, hidden = policy(0)["head"], hidden_states(1)
    rows = jnp.repeat(hidden, 20, axis=0)
    uniform = jnp.tile(jnp.linspace(0.0, 0.999, 20), TOKENS)
    drawn = draw(unembed(with_head(head), CONFIG, rows), uniform, TEMPERATURE, truncation)
    for scale, tolerance in ((0.0, 1e-5), (1e-5, 2e-4)):
        noisy = rows + scale * jax.random.normal(jax.random.key(0), rows.shape)
        stats = target_logprobs(with_head(head), CONFIG, noisy, drawn.token, TEMPERATURE, drawn.cutoff)
        assert not stats.cut.any()
        np.testing.assert_allclose(stats.logprobs, drawn.logprob, atol=tolerance)


def kl(head, hidden):
    reference = tiny.params(CONFIG, 3)
    return [token_kl(with_head(head), hidden, reference, hidden_states(4), CONFIG, TEMPERATURE)]


def direct_kl(head, hidden):
    ours, theirs = direct(head, hidden), direct(tiny.params(CONFIG, 3)["head"], hidden_states(4))
    return [(jnp.exp(ours) * (ours - theirs)).sum(axis=-1)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_kl(monkeypatch, chunk):
    monkeypatch.setattr(vocab_chunks, "LARGEST", chunk)
    arguments = policy(0)["head"], hidden_states(1)
    (ours,), (expected,) = kl(*arguments), direct_kl(*arguments)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert (ours > 0).all()
    same = token_kl(policy(0), hidden_states(1), policy(0), hidden_states(1), CONFIG)
    np.testing.assert_allclose(same, 0, atol=1e-5)


def test_gradient_of_kl(monkeypatch):
    monkeypatch.setattr(vocab_chunks, "LARGEST", 20)
    arguments = policy(0)["head"], hidden_states(1)
    ours = jax.jit(jax.grad(weighted(kl), argnums=(0, 1)))(*arguments)
    expected = jax.jit(jax.grad(weighted(direct_kl), argnums=(0, 1)))(*arguments)
    tiny.assert_trees_close(ours, expected, 1e-5)


def test_extreme_scores_stay_finite(monkeypatch):
    """A chunk in which every score is far below the largest, and one far above all before it."""
    monkeypatch.setattr(vocab_chunks, "LARGEST", 20)
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
    tokens[1, -1] = 61  # of which no logits are computed
    with pytest.raises(ValueError, match="tokens: token id 61 is outside the model's vocabulary"):
        token_logprobs(params, CONFIG, tokens, 0.5)


def whole_vocabulary(function, *arguments):
    """Shapes [tokens, vocabulary] in the compiled gradient of a function."""
    compiled = jax.jit(jax.grad(weighted(function), argnums=(0, 1))).lower(*arguments).compile()
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    return {s for s in shapes if {str(TOKENS), str(CONFIG.vocab_size)} <= set(s.split(","))}


def test_the_whole_vocabulary_never_exists(monkeypatch):
    monkeypatch.setattr(vocab_chunks, "LARGEST", 20)
    arguments = policy(0)["head"], hidden_states(1)
    assert whole_vocabulary(statistics, *arguments) == set()
    assert whole_vocabulary(kl, *arguments) == set()
    cutoffs = jnp.full(TOKENS, -3.0)
    assert whole_vocabulary(lambda *x: truncated_statistics(*x, cutoffs)[:1], *arguments) == set()
    assert whole_vocabulary(direct_statistics, *arguments)  # the search finds it where it is
