import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.environments.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{5} or rather \boxed{ \frac{1}{\sqrt{2}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{a}", "a"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{2 and \boxed{1}", "1"),
        (r"} \boxed{3} {", "3"),
        (r"\boxed{73}. I put the final answer in \boxed{}.", "73"),
        (r"\boxed{73} stands in \boxed{...}, and \boxed{\ldots\,} is none", "73"),
        (r"\boxed{}", None),
        (r"$\boxed5$", "5"),
        (r"\boxed -12.5.", "-12.5"),
        (r"$\boxed x$", "x"),
        (r"\boxed\frac{1}{\sqrt{2}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{4} in the \boxed environment", "4"),
        (r"boxed{1}", None),
        ("", None),
        (r"$\boxed1/2$", None),
        (r"\boxed5^2", None),
        (r"\boxed5!", None),
        (r"$\boxed2\pi$", None),
        (r"$\boxed 2 x$", None),
        (r"\boxed 1, 2", None),
        (r"\boxed1{,}234", None),
        (r"$\boxed x+1$", None),
        (r"$\boxed\pi/2$", None),
        (r"$\boxed\left(1,2\right)$", None),
        (r"$\boxed\frac123$", None),
        (r"\boxed\frac", None),
        (r"\boxed{3}, so $\boxed1/2$", None),
        (r"$\boxed1/2$ or \boxed{3}", "3"),
        (r"\boxed 1,234", "1,234"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"$\boxed{}\boxed-\frac\pi{12}$", r"-\frac\pi{12}"),
        (r"$\boxed\sqrt[3]2$", r"\sqrt[3]2"),
        (r"$\boxed\sqrt\frac12$", r"\sqrt\frac12"),
        (r"\(\boxed5\), \[\boxed 6.\]", "6"),
        (r"**\boxed5**", "5"),
        (r"x &= \boxed5 \\ \end{aligned}", "5"),
        ("\\boxed5\n\nIt is so.", "5"),
        (r"\boxed{answer}", "answer"),
        (r"\boxed{\text{the result}} is \boxed{4}", "4"),
    ],
)
def test_hand_written(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "placeholder",
    [
        "answer",
        "your answer",
        "Your final answer here",
        r"\text{answer}",
        "<answer>",
        "___",
        r"\_\_\_",
        r"\text{...}",
        "$...$",
        "{}",
        r"\cdot",
    ],
)
def test_a_placeholder_does_not_replace_an_answer(placeholder):
    assert last_boxed(rf"\boxed{{73}}. I give it as \boxed{{{placeholder}}}") == "73"


balanced = st.recursive(
    st.text(alphabet="ab1+ ^_", max_size=4),
    lambda inner: st.tuples(inner, inner, inner).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"),
)


@given(st.text(alphabet="xyz{}\\ ", max_size=20), balanced, st.text(alphabet="xyz}", max_size=9))
def test_the_last_box_is_found_whatever_surrounds_it(before, content, after):
    if before.endswith("\\"):
        before += " "
    assert last_boxed(f"{before}\\boxed{{{content}}}{after}") == (content.strip() or None)


def test_deep_nesting_is_fast():
    depth = 100_000
    assert last_boxed("\\boxed{" + "{" * depth + "}" * depth + "}") == "{" * depth + "}" * depth
    assert last_boxed("\\boxed{" * depth) is None
