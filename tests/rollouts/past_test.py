"""Earlier rollouts: those that a run keeps in memory are those that it reads from its log."""

import numpy as np
import pytest

from espl_jax.rollouts import past as past_texts
from espl_jax.rollouts.past import Past
from espl_jax.types import Problem


def records(problems, lengths, first=0):
    """Rollouts of these problems with these lengths; all tokens of one are its number."""
    return [
        {"problem": problem, "tokens": [first + i] * length}
        for i, (problem, length) in enumerate(zip(problems, lengths, strict=True))
    ]


def kept(past):
    return {problem: [text.tolist() for text in texts] for problem, texts in past.texts.items()}


def test_texts_of_problems():
    past = Past.of_records(records("abab", [2, 1, 3, 0]))
    assert kept(past) == {"a": [[0, 0], [2, 2, 2]], "b": [[1], []]}
    problems = [Problem(id=name, text=name, answer="") for name in "bc"]
    assert [len(texts) for texts in past.on(problems)] == [2, 0]


def test_no_more_is_kept_than_the_texts():
    """A view of one text would keep the padded tokens of a whole iteration."""
    tokens = np.zeros((2, 1000), np.int32)
    past = Past()._with(("a", row[:3]) for row in tokens)
    assert all(text.base is None for text in past.texts["a"])


@pytest.mark.parametrize(("on_problem", "in_total"), [(5, 10**6), (10**6, 12), (4, 9)])
def test_the_oldest_go_first(monkeypatch, on_problem, in_total):
    """Rollouts one iteration at a time, and all at once as from a log."""
    monkeypatch.setattr(past_texts, "MOST_SHARED", on_problem)
    monkeypatch.setattr(past_texts, "MOST_TOKENS", in_total)
    rng, log, past = np.random.default_rng(0), [], Past()
    for iteration in range(20):
        new = records(rng.choice(list("abcd"), 4), rng.integers(0, 4, 4), 10 * iteration)
        log += new
        past = past._with((each["problem"], each["tokens"]) for each in new)
        assert kept(past) == kept(Past.of_records(log))
        assert sum(len(text) for texts in past.texts.values() for text in texts) <= in_total + 3
        newest = log[-1]
        assert past.texts[newest["problem"]][-1].tolist() == newest["tokens"]
        for texts in past.texts.values():
            assert sum(map(len, texts[1:])) < on_problem
