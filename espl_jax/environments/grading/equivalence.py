r"""Whether an answer is equivalent to the gold one. Runs in grading processes only.

What answers consist of is compared here, by the rules of `answers`; whether two values are equal is asked
of math-verify, which reads LaTeX into sympy. It never sees decimals (they are fractions by then), units,
names or lists, about which it is more lenient than a competition grader, nor two numbers that differ: it
takes any number below its precision for 0.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import math_verify
import sympy

from espl_jax.environments.grading.answers import Answer, readings
from espl_jax.environments.grading.latex import CLOSE, OPEN

_LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    # Units have been taken off. Its own list has "m", "c" and "s", which are variables, too.
    normalization_config=math_verify.LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)
# None is no limit, which the annotation leaves out.
_read = functools.partial(math_verify.parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

_DIGITS = 50
"""Decimal digits to which values without a simpler proof are compared, beside those that `_scale` counts."""

_SURE_DIGITS = 30
"""Numbers that are only approximated, as integrals are, differ if they do so within this many digits."""

_MOST_DIGITS = 10_000
"""Values that need more digits than these are equal only if they are rational."""

_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)
_APPROXIMATED = (*_UNFINISHED, sympy.Float)

_MOST_OPERATIONS, _LARGEST = 30, 1000
"""Operations in a sum or an integral that is evaluated, and its bounds and exponents."""

_LEAST_DIGITS = 15
"""Decimal digits to which math-verify compares by itself."""

_SMALL, _ROUGH = 1e-5, 1e-3
"""Decimals that differ by less than the first are equal only within the second, relative to the gold one."""

_RATIONAL = re.compile(
    r"(?P<sign>[-+]?)\s*(?:\(?\\frac\{(?P<numerator>-?\d+)\}\{(?P<denominator>\d+)\}\)?"
    r"|(?P<number>\d+)(?:\s*/\s*(?P<divisor>\d+))?)",
    re.ASCII,
)

# Numbers in another base, of which math-verify drops the base.
_BASE = re.compile(r"\d\s*_")
_UNEVALUATED = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|limsup|liminf|bigcup|bigcap)(?![a-zA-Z])")

# The parser is slow with what it sees for the first time, and so is sympy.
_FAMILIAR = (
    r"\frac{3\sqrt{7}}{7}",
    r"-2^{5} \cdot 6! + \sqrt[3]{x^2}",
    r"\binom{n+1}{2} \times 3^{-1/2}",
    r"(x+1)(y-2)/a_1",
    r"\log_2 3 - \ln(2) + e^{2} + |x|",
    r"\sin\left(\frac{\pi}{3}\right) + \cos x",
    "y=2x+1",
    r"(-\infty, 1] \cup (2, 3)",
    r"\{1, 2\}",
    "(1, 2, 3)",
    "1, 2",
)


def judge(rule: str, gold: str, text: str) -> tuple[bool, str | None]:
    """Whether an answer is right, and the answer as it was read.

    Args:
      rule: `boxed`, where the text is the content of a box; or `expression`, where it is a reply, of which
        math-verify chooses the final expression and compares it, as the paper's released code does.
      gold: the right answer.
      text: the answer or the reply.
    """
    if rule == "boxed":
        return equivalent(gold, text), text
    parsed = _read(text)
    # Parsing gives an expression and the characters that it came from.
    answer = next((part for part in parsed if isinstance(part, str)), None)
    if answer is not None and answer.strip() == gold.strip():
        return True, answer
    right = _read(rf"\boxed{{{gold}}}")
    return _same_expressions(right, parsed), answer


def equivalent(gold: str, text: str) -> bool:
    r"""Whether two answers are the same to a lenient competition grader.

    An answer that leaves a sum, product, integral or limit to be evaluated is wrong, unless the gold one
    does. Other arithmetic (`10/2`, `\binom{5}{2}`, `\cos 0`) counts as its value.
    """
    if set(_UNEVALUATED.findall(text)) - set(_UNEVALUATED.findall(gold)):
        return False
    return any(_same(right, answer) for right in readings(gold) for answer in readings(text))


def warm_up() -> None:
    """Loads what the first answers would have to wait for."""
    logging.disable(logging.CRITICAL)
    for text in _FAMILIAR:
        _equal(text, f"1+{text}")
    judge("expression", "1", "$1$")


def prepare(rule: str, gold: str) -> None:
    """Answers have nothing in common that could be prepared."""


def _same(gold: Answer, answer: Answer) -> bool:
    if "value" in (gold.kind, answer.kind) and "words" not in (gold.kind, answer.kind):
        return _same_with_value(gold, answer)
    if "words" in (gold.kind, answer.kind):
        return {gold.kind, answer.kind} <= {"words", "value"} and _spell(gold.text) == _spell(answer.text)
    if gold.kind == answer.kind == "tuple":
        return gold.text == answer.text and _in_order(gold, answer)
    if gold.kind == answer.kind == "list":
        if _has_names(gold) != _has_names(answer):
            return _in_order(gold, answer)
        return _matched(gold.items, answer.items)
    kinds = {gold.kind, answer.kind}
    if kinds == {"tuple", "list"}:
        return "(" in gold.text + answer.text and _in_order(gold, answer)
    if kinds <= {"set", "list"}:
        return _covered(gold.items, answer.items) and _covered(answer.items, gold.items)
    if "union" in kinds:
        return _same_sets(gold, answer)
    return False


def _same_with_value(gold: Answer, answer: Answer) -> bool:
    """Where at least one is a single value."""
    if gold.kind == answer.kind:
        return _same_values(gold, answer)
    for group, value in ((gold, answer), (answer, gold)):
        if group.kind in ("set", "list") and len(group.items) == 1:
            return _same(group.items[0], value) if group is gold else _same(value, group.items[0])
    # Sets that only math-verify can read, such as the reals without a number.
    return _equal(_written(gold), _written(answer))


def _in_order(gold: Answer, answer: Answer) -> bool:
    return len(gold.items) == len(answer.items) and all(map(_same, gold.items, answer.items))


def _matched(gold: tuple[Answer, ...], answer: tuple[Answer, ...]) -> bool:
    """Whether items are equal one to one, those with names by their names."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        found = next((other for other in left if _same_names(item, other) and _same(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _has_names(answer: Answer) -> bool:
    return any(item.left for item in answer.items)


def _same_names(gold: Answer, answer: Answer) -> bool:
    compact = {re.sub(r"[\s{}]", "", item.left) for item in (gold, answer)}
    return len(compact) == 1 or "" in compact


def _covered(items: tuple[Answer, ...], by: tuple[Answer, ...]) -> bool:
    return all(any(_same(other, item) for other in by) for item in items)


def _same_sets(gold: Answer, answer: Answer) -> bool:
    if gold.kind == answer.kind and _matched(gold.items, answer.items):
        return True
    # [1,2] \cup [2,3] is [1,3].
    return _equal(_written(gold), _written(answer))


def _same_values(gold: Answer, answer: Answer) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.left and answer.left and _equal(f"{gold.left}={gold.text}", f"{answer.left}={answer.text}"):
        return True
    # x^2 + y^2 = 25 is no name for 25, nor 2x = 6 for 6.
    if gold.naming in ("expression", "equation") or answer.naming == "equation":
        return False
    if gold.scale and answer.scale and gold.scale != answer.scale:
        return False
    if _equal(gold.text, answer.text):
        return True
    if gold.scale == answer.scale:
        return False
    return _equal(_scaled(gold), _scaled(answer))


def _scaled(answer: Answer) -> str:
    factors = {"percent": r"\frac{1}{100}", "degree": r"\frac{\pi}{180}"}
    return rf"({answer.text}) \cdot {factors[answer.scale]}" if answer.scale else answer.text


def _spell(words: str) -> str:
    # Capitals matter in names of one letter.
    return words if len(words) == 1 else words.lower()


def _written(answer: Answer) -> str:
    """The LaTeX of an answer, for math-verify."""
    items = [_written(item) for item in answer.items]
    if answer.kind == "tuple":
        return f"{answer.text[0]}{', '.join(items)}{answer.text[1]}"
    if answer.kind == "set":
        return rf"\{{{', '.join(items)}\}}"
    if answer.kind == "union":
        return r" \cup ".join(items)
    return ", ".join(items) if items else answer.text


def _equal(gold: str, answer: str) -> bool:
    if _compact(gold) == _compact(answer):
        return bool(gold.strip())
    if _BASE.search(gold + answer):
        return False
    numbers = _rational(gold), _rational(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    right, parsed = _parse(gold), _parse(answer)
    if not right or not parsed:
        return False
    positive = _positive_symbols(right[0])
    right, parsed = ([_finished(each.xreplace(positive)) for each in some] for some in (right, parsed))
    # math-verify takes what is smaller than its precision for 0: it has to be finer than any number here.
    # Sums, integrals and limits are approximated, which takes long to many digits.
    digits = _DIGITS
    if not any(each.has(*_UNFINISHED) for each in (right[0], parsed[0])):
        digits += sum(_scale(each) for each in (right[0], parsed[0]))
    same = _same_numbers(right[0], parsed[0], min(digits, _MOST_DIGITS))
    if same is not None or digits > _MOST_DIGITS:
        return bool(same)
    return bool(math_verify.verify(right, parsed, numeric_precision=digits, timeout_seconds=None))


def _same_expressions(right: list[Any], parsed: list[Any]) -> bool:
    """What math-verify says of what it parsed, without its absolute tolerance for small numbers."""
    gold, answer = (
        next((part for part in each if not isinstance(part, str)), None) for each in (right, parsed)
    )
    if gold is None or answer is None or any(part.has(*_UNFINISHED) for part in (gold, answer)):
        return bool(math_verify.verify(right, parsed, timeout_seconds=None))
    if any(part.has(sympy.Float) for part in (gold, answer)):
        # Rounded to a number of decimals by math-verify.
        same = bool(math_verify.verify(right, parsed, timeout_seconds=None))
        return same and not _differ_in_size(gold, answer)
    digits = _LEAST_DIGITS + _scale(gold) + _scale(answer)
    precision = min(digits, _MOST_DIGITS)
    same = bool(math_verify.verify(right, parsed, numeric_precision=precision, timeout_seconds=None))
    return same and not (digits > _MOST_DIGITS and _same_numbers(gold, answer, precision) is False)


def _differ_in_size(gold: Any, answer: Any) -> bool:
    """Whether two numbers that are equal when rounded to decimals are far apart for their size."""
    if not all(isinstance(each, sympy.Expr) and each.is_number for each in (gold, answer)):
        return False
    difference = abs((gold - answer).evalf(_LEAST_DIGITS))
    return bool(difference < _SMALL and difference > _ROUGH * abs(gold.evalf(_LEAST_DIGITS)))


def _compact(text: str) -> str:
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\s+", "", words))


def _rational(text: str) -> Fraction | None:
    """The number that a text is, where that can be seen without parsing it."""
    match = _RATIONAL.fullmatch(text)
    if match is None:
        return None
    divisor = int(match["denominator"] or match["divisor"] or 1)
    if not divisor:
        return None
    value = Fraction(int(match["numerator"] or match["number"]), divisor)
    return -value if match["sign"] == "-" else value


def _same_numbers(gold: Any, answer: Any, digits: int) -> bool | None:
    """Whether two numbers are equal, or None where neither digits nor arithmetic decide that.

    Digits show a difference long before all proofs of equality have failed. Rational numbers are compared
    exactly, others up to that number of digits.
    """
    if not all(
        isinstance(each, sympy.Expr) and each.is_number and not each.is_Matrix for each in (gold, answer)
    ):
        return None
    difference = gold - answer
    least = 0
    if difference.has(*_APPROXIMATED):
        # sympy approximates sums with an absolute error, and small ones by 0.
        size = abs(gold.evalf(_SURE_DIGITS))
        least = 10**-_SURE_DIGITS * (size if size.is_comparable and size else 1)
    for part in difference.evalf(_DIGITS, maxn=digits).as_real_imag():
        # A part of which no digit is sure is not comparable.
        if part.is_comparable and abs(part) > least:
            return False
    if all(map(_is_arithmetic, sympy.preorder_traversal(difference))):
        return difference.doit() == 0
    return None


def _finished(expression: Any) -> Any:
    """Replaces sums and integrals whose values sympy finds fast: of geometric terms and of polynomials."""
    parts: Iterable[Any] = ()
    if isinstance(expression, sympy.Expr):
        parts = expression.atoms(sympy.Sum, sympy.Integral)
    values = {}
    for part in filter(_finishes_fast, parts):
        value = part.doit()
        if not value.has(*_UNFINISHED, sympy.Piecewise, sympy.nan):
            values[part] = value
    return expression.xreplace(values)


def _finishes_fast(part: Any) -> bool:
    function = part.function
    is_simple = part.is_number and len(part.limits) == 1 and len(part.limits[0]) == 3
    if not is_simple or function.count_ops() > _MOST_OPERATIONS:
        return False
    variable, *ends = part.limits[0]
    numbers = (*ends, *(power.exp for power in function.atoms(sympy.Pow)))
    if any(abs(number) > _LARGEST for number in numbers if number.is_Integer):
        return False
    if isinstance(part, sympy.Integral):
        return function.is_polynomial(variable) and not any(end.is_infinite for end in ends)
    ratio = function.subs(variable, variable + 1) / function
    return not sympy.simplify(ratio).has(variable)


def _is_arithmetic(part: Any) -> bool:
    """Whether a part of an expression keeps numbers rational. sympy's `is_rational` is slow to say so."""
    if isinstance(part, sympy.Pow):
        return bool(part.exp.is_integer)
    return isinstance(part, sympy.Rational | sympy.Add | sympy.Mul | sympy.factorial | sympy.binomial)


def _scale(expression: Any) -> int:
    """Decimal digits before or after the point that the numbers in an expression take, all together."""
    digits = 0
    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Expr) and part.is_number and not part.has(*_APPROXIMATED):
            size = abs(part.evalf(5))
            if isinstance(size, sympy.Float) and size:
                digits += abs(sympy.Float(size)._mpf_[2] + size._mpf_[3]) * 3 // 10
    return digits


def _positive_symbols(gold: Any) -> dict[sympy.Symbol, sympy.Symbol]:
    """Letters that have to be positive for the gold answer to be real, as n in `1/sqrt(n)`."""
    positive = {}
    bases = [power.base for power in gold.atoms(sympy.Pow) if power.exp.is_Rational and not power.exp.q % 2]
    for base in (*bases, *(log.args[0] for log in gold.atoms(sympy.log))):
        for symbol in base.free_symbols if len(base.free_symbols) == 1 else ():
            signs = [
                base.xreplace({symbol: sympy.Symbol(symbol.name, **{sign: True})})
                for sign in ("positive", "negative")
            ]
            if signs[0].is_positive and signs[1].is_negative:
                positive[symbol] = sympy.Symbol(symbol.name, positive=True)
    return positive


@functools.lru_cache(maxsize=512)
def _parse(text: str) -> list[Any]:
    text = text.replace(OPEN, r"\{").replace(CLOSE, r"\}")
    parsed = _read(rf"\boxed{{{text}}}", [_LATEX], fallback_mode="no_fallback")
    return [_with_real_symbols(expression) for expression in parsed]


def _with_real_symbols(expression: Any) -> Any:
    """Letters are real, but for i. math-verify decides about all letters by how an answer is written."""
    names = {symbol: symbol.name for symbol in getattr(expression, "free_symbols", ())}
    return expression.xreplace(
        {symbol: sympy.I if name == "i" else sympy.Symbol(name, real=True) for symbol, name in names.items()}
    )
