import pytest

from espl_jax.data.statements import comparable, final_answer, without_instruction
from tests.support.dataset_hub import DAPO_AFTER, DAPO_BEFORE

SIMPLE_EVALS_BEFORE = DAPO_BEFORE.replace("$Answer", "$ANSWER")
SIMPLE_EVALS_AFTER = DAPO_AFTER[:-1] + ", and you do not need to use a \\boxed command."
BOXED_BEFORE = DAPO_BEFORE.replace("$Answer (without quotes)", r"\boxed{$Answer}")


@pytest.mark.parametrize("before", [DAPO_BEFORE, SIMPLE_EVALS_BEFORE, BOXED_BEFORE, "\n" + DAPO_BEFORE, ""])
@pytest.mark.parametrize("after", [DAPO_AFTER, SIMPLE_EVALS_AFTER, DAPO_AFTER + "\n", DAPO_AFTER[:-1], ""])
def test_the_instruction_of_dapo_is_taken_off(before, after):
    text = "Find $x$.\n\nRemember that $x > 0$.\nAnswer: in meters."
    assert without_instruction(before + text + after) == text


@pytest.mark.parametrize(
    "text",
    [
        "Solve the following math problem step by step. What is 1 + 1?",
        'He says: Remember to put your answer on its own line after "Answer:".\nWhat does he mean?',
        "Copy this: " + DAPO_BEFORE.strip() + " How many words are there?",
        "How many lines?\n  a\n  b",
    ],
)
def test_other_texts_are_left_alone(text):
    assert without_instruction(text) == text


def test_final_answers():
    assert final_answer("3 * 4 = <<3*4=12>>12\n#### 1,012 ") == "1,012"
    assert final_answer(" \\frac12 ") == "\\frac12"
    assert final_answer("so ####") == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 1 + 1?", " what is\n1+1 "),
        (r"$\left( a, b \right)$", "(a,b)"),
        (r"\[ \dfrac{1}{2} \]", r"$\frac{1}{2}$"),
        (r"Find $1{,}000\,x$.", "find 1000 x"),
        (r"the $\displaystyle \sum x_i$; here", r"The \(\sum x_i\) here."),
        ("He said “no”.", 'he said "no"'),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A} costs \\$5", "A costs $5$"),
    ],
)
def test_what_does_not_count_in_a_comparison(one, other):
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 1.5?", "What is 15?"),
        ("5! + 1", "5 + 1"),
        ("f'(x)", "f(x)"),
        ("1 2", "12"),
        ("What is 1 + 12?", "What is 11 + 2?"),
        ("a - b", "a + b"),
        (r"\leftarrow x", r"\rightarrow x"),
        ("?", "."),
    ],
)
def test_what_counts_in_a_comparison(one, other):
    assert comparable(one) != comparable(other)
