import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_jax.environments.grading.latex import exact_decimals, simplify


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        (r"\displaystyle\left(\dfrac12\right)", r"(\frac{1}{2})"),
        (r"\tfrac{\sqrt 3}2x", r"\frac{\sqrt{3}}{2} x"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"\sqrt[3]2+\sqrt10", r"\sqrt[3]{2}+\sqrt{1} 0"),
        (r"1{,}234,\!567\,890", "1,234,567,890"),
        ("2 1/2", r"(2+\frac{1}{2})"),
        (r"2\frac32", r"2\frac{3}{2}"),
        (r"x^2\frac12", r"x^2\frac{1}{2}"),
        ("−3×½", r"-3\times \frac{1}{2}"),
        ("8√10", r"8\sqrt{10}"),
        (r"$5$ \quad \text{ }", "5"),
        (r"\left\{1\right\}", "⦃1⦄"),
        (r"30^{\circ}", r"30^\circ"),
        (r"\mathrm{cm}", r"\text{cm}"),
        (r"x\leqslant 3", r"x\le 3"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\leftarrow", r"\leftarrow"),
        ("x = **7**, `y`", "x = 7, y"),
        ("2**3, 2 **3** 4", "2^3, 2 ^3^ 4"),
    ],
)
def test_simplify(text, simple):
    assert simplify(text) == simple


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("0.5", r"(\frac{5}{10})"),
        (".25x", r"(\frac{25}{100})x"),
        (r"0.1\overline{6}", r"(\frac{15}{90})"),
        (r"2.\bar3", r"(\frac{21}{9})"),
        ("1.2.3", "1.2.3"),
        ("0.00", r"(\frac{0}{100})"),
    ],
)
def test_decimals_become_fractions(text, exact):
    assert exact_decimals(text) == exact


@given(st.text(alphabet=r"\{}fracsqt12 .,$^_+-()[]", max_size=60))
def test_whatever_is_written(text):
    once = simplify(text)
    assert isinstance(exact_decimals(once), str)
