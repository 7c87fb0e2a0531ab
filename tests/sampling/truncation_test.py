"""Compares cut-offs with a plain sort in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_jax.sampling import truncation as module
from espl_jax.sampling.truncation import BLOCK, Truncation, cutoff
from tests.sampling.boundaries import kept_tokens

compiled = jax.jit(cutoff, static_argnames="truncation")


def cut(logprobs, truncation, temperature=1.0):
    return np.asarray(compiled(jnp.asarray(logprobs), temperature, truncation))


def kept(logprobs, truncation):
    return logprobs >= cut(logprobs, truncation)[:, None]


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


FOUR = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Truncation(), [1, 1, 1, 1]),
        (Truncation(top_k=1), [0, 1, 0, 0]),
        (Truncation(top_k=3), [0, 1, 1, 1]),
        (Truncation(top_k=4), [1, 1, 1, 1]),
        (Truncation(top_k=9), [1, 1, 1, 1]),
        (Truncation(top_p=0.4), [0, 1, 0, 0]),
        (Truncation(top_p=0.7), [0, 1, 0, 1]),
        (Truncation(top_p=0.8), [0, 1, 1, 1]),
        (Truncation(top_p=1e-6), [0, 1, 0, 0]),
        (Truncation(min_p=0.25), [0, 1, 1, 1]),
        (Truncation(min_p=1.0), [0, 1, 0, 0]),
        # Of what top-k leaves, the most likely token has 2/3.
        (Truncation(top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (Truncation(top_k=3, top_p=0.8), [0, 1, 0, 1]),
        (Truncation(top_k=3, top_p=0.9, min_p=0.4), [0, 1, 0, 1]),
    ],
    ids=str,
)
def test_by_hand(truncation, expected):
    assert kept(FOUR, truncation).tolist() == [[bool(x) for x in expected]]


def test_the_cutoff_is_in_the_middle():
    assert cut(FOUR, Truncation(top_p=0.7)) == (FOUR[:, 3] + FOUR[:, 2]) / 2
    assert cut(FOUR, Truncation()) == cut(FOUR, Truncation(top_k=4)) == -np.inf


def test_the_cutoff_is_the_kept_one_where_nothing_lies_between():
    for logit in np.array([1.0, -2.7, 5.1], np.float32):
        below = np.nextafter(logit, np.float32(-9))
        logits = np.array([[below, logit, below, below]])
        assert cut(logits, Truncation(top_k=1)) == logit
    impossible = np.array([[0.0, -np.inf, -0.5, -np.inf]], np.float32)
    assert cut(impossible, Truncation(top_k=2)) == cut(impossible, Truncation(top_p=0.99)) == -np.inf


def test_temperature_and_a_constant_change_the_cutoff_as_they_change_logits():
    logits = np.random.default_rng(0).normal(size=(8, 300)).astype(np.float32) * 3
    for truncation in (Truncation(top_p=0.8), Truncation(top_k=9), Truncation(min_p=0.05)):
        expected = cut(logits / 0.7, truncation) * 0.7
        np.testing.assert_allclose(cut(logits, truncation, 0.7), expected, atol=1e-5)
        np.testing.assert_allclose(cut(logits + 7, truncation, 0.7), expected + 7, atol=1e-5)


def test_a_cutoff_does_not_depend_on_other_rows():
    """Rows get the same cut-off alone and in a batch with a row that needs the whole vocabulary."""
    rng = np.random.default_rng(0)
    logits = (4 * rng.normal(size=(64, module.CANDIDATES * BLOCK + 4000))).astype(np.float32)
    alone = cut(logits, Truncation(top_p=0.95))
    together = cut(np.concatenate([logits, np.zeros_like(logits[:1])]), Truncation(top_p=0.95))
    assert (kept(logits, Truncation(top_p=0.95)).sum(axis=1) > 100).any()
    np.testing.assert_array_equal(together[:-1], alone)


def test_ties_are_all_kept():
    logprobs = np.log(np.array([[0.4, 0.2, 0.2, 0.2], [0.25] * 4], np.float32))
    for truncation in (Truncation(top_k=2), Truncation(top_p=0.5), Truncation(top_k=2, min_p=0.4)):
        assert kept(logprobs, truncation).all(), truncation


@st.composite
def distributions(draw):
    """Rows of 61 logprobs, peaked or flat, some tokens impossible, some exactly as likely as others."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(8, 61)) * draw(st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    if draw(st.booleans()):
        logits = np.round(logits, 1)
    logits[:, 1:][rng.random((8, 60)) < draw(st.sampled_from([0.0, 0.5, 0.98]))] = -np.inf
    return log_softmax(logits)


@settings(max_examples=100, deadline=None)
@given(
    distributions(),
    st.sampled_from(
        [
            Truncation(top_k=7),
            Truncation(top_k=60),
            Truncation(top_p=0.95),
            Truncation(top_p=0.3),
            Truncation(min_p=0.02),
            Truncation(top_k=12, top_p=0.8),
            Truncation(top_k=20, top_p=0.99, min_p=0.1),
        ]
    ),
)
def test_against_a_sort(logprobs, truncation):
    top_k, top_p, min_p = truncation.top_k, truncation.top_p, truncation.min_p
    ours = kept(logprobs, truncation)
    possible = logprobs > -80
    assert ours[np.arange(8), logprobs.argmax(axis=1)].all()
    # Where float32 sums decide, either answer is right.
    fewer, more = (
        kept_tokens(
            logprobs, Truncation(top_k, min(1.0, top_p * (1 + change)), min(1.0, min_p * (1 - change)))
        )
        for change in ((-1e-5, 1e-5) if top_p < 1 or min_p else (0, 0))
    )
    assert not (fewer & ~ours & possible).any()
    assert not (ours & ~more & possible).any()
    # In the middle of its gap.
    least, most = np.where(ours, logprobs, np.inf).min(axis=1), np.where(ours, -np.inf, logprobs).max(axis=1)
    bound = cut(logprobs, truncation)
    assert ((most < bound) & (bound <= least) | (bound == -np.inf)).all()
    finite = np.isfinite(bound)
    np.testing.assert_allclose(bound[finite], ((most + least) / 2)[finite], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_large_vocabulary(scale):
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(4, 49_152)) * scale)
    ordered = -np.sort(-logprobs, axis=1)
    for k in (1, 50, 191, 192, 3000):
        ours = cut(logprobs, Truncation(top_k=k))
        assert ((ordered[:, k] < ours) & (ours <= ordered[:, k - 1])).all()
    for top_p in (0.5, 0.95, 0.999):
        ours = kept(logprobs, Truncation(top_p=top_p))
        probs = np.exp(logprobs.astype(np.float64))
        held, least = (probs * ours).sum(axis=1), np.where(ours, probs, 1).min(axis=1)
        assert (held >= top_p - 2e-6).all() and (held - least < top_p + 2e-6).all()


@st.composite
def many_blocks(draw):
    """Rows of 40 blocks, their likely tokens in few of them or in many, some as likely as others."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(8, 40, BLOCK)) * draw(st.sampled_from([0.1, 2.0, 8.0]))
    logits += rng.normal(size=(8, 40, 1)) * draw(st.sampled_from([0.0, 5.0]))
    if draw(st.booleans()):
        logits = np.round(logits)
    return logits.reshape(8, -1).astype(np.float32)


NARROW = {}


def narrow(logits, truncation):
    """The cut-off with six blocks searched first."""
    if truncation not in NARROW:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CANDIDATES", 6)
            shapes = jax.ShapeDtypeStruct(logits.shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
            lowered = jax.jit(lambda *x: cutoff(*x, truncation)).lower(*shapes)
            NARROW[truncation] = lowered.compile()
    return np.asarray(NARROW[truncation](logits, np.float32(1)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    many_blocks(),
    st.sampled_from(
        [
            Truncation(top_k=5),
            Truncation(top_k=6),
            Truncation(top_p=0.5),
            Truncation(top_p=0.99),
            Truncation(min_p=0.01),
            Truncation(top_k=5, top_p=0.7, min_p=0.1),
            Truncation(top_k=6, top_p=0.95),
        ]
    ),
)
def test_searching_few_blocks_first_changes_nothing(logits, truncation):
    whole, few = cut(logits, truncation), narrow(logits, truncation)
    assert "conditional(" in NARROW[truncation].as_text()
    differ = (logits >= whole[:, None]) != (logits >= few[:, None])
    if truncation.top_p == 1:
        assert not differ.any() and np.array_equal(whole, few)
    else:  # sums in another order may decide otherwise about the last token and those as likely
        assert all(len(set(row[where])) <= 1 for row, where in zip(logits, differ, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "top_k=-1: give a whole number"),
        ({"top_k": 1.5}, "top_k=1.5: give a whole number"),
        ({"top_p": 0.0}, "top_p=0.0: give a probability above 0"),
        ({"top_p": 1.1}, "top_p=1.1: give a probability above 0"),
        ({"min_p": -0.1}, "min_p=-0.1: give a ratio of at most 1"),
        ({"min_p": 1.1}, "min_p=1.1: give a ratio of at most 1"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Truncation(**fields)


def test_false_where_nothing_is_cut():
    assert not Truncation()
    assert Truncation(top_k=1) and Truncation(top_p=0.9) and Truncation(min_p=0.1)
    assert hash(Truncation(5)) == hash(Truncation(top_k=5))
