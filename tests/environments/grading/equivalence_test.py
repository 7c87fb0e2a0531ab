"""The rules of equivalence, on answers written by hand and on real ones."""

import itertools
import time

import pytest

from espl_jax.data.jsonl import read_jsonl
from espl_jax.environments.grading.equivalence import judge
from espl_jax.environments.math import Math
from espl_jax.types import Problem
from tests.environments.answers.pairs import KNOWN_ERRORS, PAIRS
from tests.environments.answers.rewritings import rewritings


@pytest.fixture(scope="module")
def math():
    math = Math(timeout=30)
    yield math
    math.close()


def graded(math, pairs):
    """Whether each of (gold, answer) pairs counts as right."""
    problems = [Problem("p", "", gold) for gold, _ in pairs]
    grades = math.grade(problems, [rf"\boxed{{{answer}}}" for _, answer in pairs])
    return [grade.success for grade in grades]


def test_there_are_many_pairs_of_both_kinds():
    pairs = [pair for entries in PAIRS.values() for pair in entries]
    assert len(pairs) == len({(gold, answer) for gold, answer, _ in pairs}), "a pair is there twice"
    assert sum(right for *_, right in pairs) > 300 < sum(not right for *_, right in pairs)
    assert {(gold, answer) for gold, answer, _ in pairs} >= KNOWN_ERRORS


@pytest.mark.parametrize("category", PAIRS)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_errors_are_the_known_ones(math, category, every):
    judged = PAIRS[category][::every]
    pairs = [(gold, answer) for gold, answer, _ in judged]
    grades = zip(judged, graded(math, pairs), strict=True)
    errors = {(gold, answer) for (gold, answer, right), success in grades if success != right}
    assert errors == KNOWN_ERRORS & set(pairs)


@pytest.mark.slow
def test_real_answers_are_themselves_however_they_are_written(math, shared):
    answers = [problem.answer for problem in read_jsonl(shared / "data" / "hmmt_feb_2025.jsonl").problems]
    written = {answer: rewritings(answer) for answer in answers}
    assert len(answers) == 30 and min(map(len, written.values())) >= 5
    pairs = [(answer, text) for answer, texts in written.items() for text in texts.values()]
    wrong = [pair for pair, success in zip(pairs, graded(math, pairs), strict=True) if not success]
    assert wrong == []


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_real_answers_are_not_each_other(math, shared, every):
    answers = [problem.answer for problem in read_jsonl(shared / "data" / "hmmt_feb_2025.jsonl").problems]
    pairs = list(itertools.permutations(answers, 2))
    assert len(pairs) == 870
    pairs = pairs[::every]
    right = [pair for pair, success in zip(pairs, graded(math, pairs), strict=True) if success]
    assert right == []


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"2^{-200}", r"2^{-201}", False),
        (r"2^{-200}", r"\frac{1}{2^{200}}", True),
        (r"2^{-200}", r"x=2^{-201}", False),
        (r"(2^{-200}, 1)", r"(2^{-201}, 1)", False),
        (r"2^{-200}", r"0.0000000001", False),
        (r"10^{-20000}", r"10^{-20001}", False),
        (r"1/3", r"0.333333", True),
        (r"0.3\pi", r"\frac{3\pi}{10}", True),
        (r"9", r"9\%", True),
    ],
)
def test_expressions_have_no_absolute_tolerance(gold, answer, right):
    assert judge("expression", gold, rf"\boxed{{{answer}}}")[0] == right


INTEGRAL = r"\int_0^1 x^{100}(1-x)^{100}dx"


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\sum_{k=200}^{\infty} 2^{-k}", r"2^{-199}", True),
        (r"\sum_{k=200}^{\infty} 2^{-k}", r"2^{-198}", False),
        (r"\sum_{k=200}^{\infty} \frac{k}{2^k}", r"\frac{201}{2^{199}}", True),
        (INTEGRAL, r"\frac{(100!)^2}{201!}", True),
        (INTEGRAL, r"\frac{(100!)^2}{200!}", False),
        pytest.param(
            r"\int_0^{\pi} \sin^{200} x dx",
            r"\frac{\binom{200}{100}\pi}{2^{200}}",
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_small_sums_and_integrals(gold, answer, right):
    begin = time.monotonic()
    assert judge("boxed", gold, answer)[0] == right
    assert time.monotonic() - begin < 30
