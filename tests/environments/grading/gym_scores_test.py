"""What an answer may hold that is evaluated."""

import pytest
import sympy

from espl_jax.environments.grading.gym_scores import parse_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6*(98 - 54) - 34 - 66", 164),
        ("3*x**2/2 + C", sympy.Rational(3, 2) * sympy.Symbol("x") ** 2 + sympy.Symbol("C")),
        ("exp(-x)*sin(2*x)", sympy.exp(-sympy.Symbol("x")) * sympy.sin(2 * sympy.Symbol("x"))),
        ("sqrt(2)*log(X)", sympy.sqrt(2) * sympy.log(sympy.Symbol("X"))),
        ("1.5e3", 1500),
        ("abs(-2) + pi", 2 + sympy.pi),
    ],
)
def test_expressions_are_parsed(text, value):
    assert sympy.simplify(parse_expression(text) - value) == 0


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "exec(chr(49))",
        "eval(x)",
        "open(1)",
        "x.evalf()",
        "(1) . real",
        "[1, 2]",
        "lambda x: x",
        "preview(x)",
        "lambdify(x, x)",
        "sympify(x)",
        "S",
        "'1'",
        "\uff45val(1)",  # becomes eval in Python
        "\\frac12",
        "print(1)",
        "exit()",
    ],
)
def test_what_else_python_could_execute_is_refused(text):
    with pytest.raises(ValueError, match="no mathematical expression"):
        parse_expression(text)
