"""Scores of answers to tasks of reasoning-gym. Runs in grading processes only.

Four scorers of the package call `eval` on the answer, and five parse it with sympy, which evaluates it too.
In a grading process, the former read literals alone, and the latter mathematical expressions alone.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import keyword
import logging
import re
import unicodedata
from typing import Any

import sympy

from espl_jax import gym

_EVALUATING = (
    "algorithmic.binary_matrix",
    "algorithmic.spiral_matrix",
    "algorithmic.string_insertion",
    "games.n_queens",
)
_PARSING = ("games.countdown", "games.puzzle24")
_FUNCTIONS = ("abs", "cbrt", "root", "sqrt")

_NAME = re.compile(r"[^\W\d]\w*")
# Quotes and brackets hold what is no expression; so do attributes, as in `x.__class__`.
_NO_EXPRESSION = re.compile(r"""["'`\\\[\]{}:;@#]|__|\.\s*[^\W\d]""")

_parse_expr = sympy.parse_expr


def warm_up() -> None:
    """Imports the package, and replaces what would execute an answer."""
    logging.disable(logging.CRITICAL)
    package = gym.package().__name__
    for name in _EVALUATING:
        setattr(importlib.import_module(f"{package}.{name}"), "eval", ast.literal_eval)  # noqa: B010
    for module in (sympy, *(importlib.import_module(f"{package}.{name}") for name in _PARSING)):
        setattr(module, "parse_expr", parse_expression)  # noqa: B010


def prepare(rule: str, gold: str) -> None:
    """Generates the entry that `gold`, the id of a problem, names."""
    gym.entry(*gym.parse_id(gold))


def judge(rule: str, gold: str, answer: str) -> tuple[bool, str | None]:
    """Scores an answer.

    Args:
      rule: unused.
      gold: id of the problem.
      answer: the answer.

    Returns:
      Whether the score is 1, and the score.
    """
    task, index = gym.parse_id(gold)
    if task.name == "complex_arithmetic" and "nan" in answer.lower():
        return False, "0.0"  # the package scores it 1, since min(1, nan) is 1
    score = gym.score(task, index, answer)
    return score >= 1, repr(score)


def parse_expression(text: str, *args: Any, **kwargs: Any) -> Any:
    """Parses an expression like `sympy.parse_expr`, but only numbers, symbols, operators and functions.

    Raises:
      ValueError: for anything else.
    """
    plain = unicodedata.normalize("NFKC", text)
    if _NO_EXPRESSION.search(plain) or not all(map(_is_mathematical, _NAME.findall(plain))):
        raise ValueError("no mathematical expression")
    return _parse_expr(text, *args, **kwargs)


def _is_mathematical(name: str) -> bool:
    if name in _FUNCTIONS:
        return True
    meant = getattr(sympy, name, None)
    if meant is None:
        return not (hasattr(builtins, name) or keyword.iskeyword(name))  # becomes a symbol
    return isinstance(meant, sympy.FunctionClass | sympy.Basic)
