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
    ],
)
def test_hand_written(text, answer):
    assert last_boxed(text) == answer


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
