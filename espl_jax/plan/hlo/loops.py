"""Trip counts of loops: from the compiler's annotation, from the loop counter, or from the caller."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

from espl_jax.plan.hlo.text import Computation, Instruction

_SAME_VALUE = ("bitcast", "convert", "copy", "copy-start", "copy-done", "reshape")
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}


def trip_count(
    computations: Mapping[str, Computation],
    computation: Computation,
    loop: Instruction,
    unknown_trips: Mapping[str, int],
) -> int:
    """Returns the trip count of a `while` instruction.

    Args:
      computations: computations of the program, by name.
      computation: the computation that contains the loop.
      loop: the `while` instruction.
      unknown_trips: trip counts by the name of the loop or the end of its op_name; used only if the program
        does not determine the count.

    Raises:
      ValueError: if the count is unknown.
    """
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
        return int(known[1])
    condition, body = computations[loop.called("condition")], computations[loop.called("body")]
    counted = _count(computations, condition, body, _value(computations, computation, loop.operands[0], {}))
    if counted is not None:
        return counted
    for pattern, trips in unknown_trips.items():
        if loop.name == pattern or loop.op_name.endswith(pattern):
            return trips
    raise ValueError(
        f"loop {loop.name} (op_name {loop.op_name!r}) has no trip count in the program; give it, e.g. "
        f"unknown_trips={{{loop.op_name or loop.name!r}: 32}}"
    )


def _count(
    computations: Mapping[str, Computation], condition: Computation, body: Computation, state: Any
) -> int | None:
    """Returns the trip count if the condition compares two numbers that change by constants, else None."""
    gaps = []
    for _ in range(3):
        compared = _compared(computations, condition, condition.root, {0: state})
        if compared is None:
            return None
        direction, left, right = compared
        gaps.append(right - left if direction in ("LT", "LE", "NE") else left - right)
        state = _value(computations, body, body.root, {0: state})
    first, closing = gaps[0], gaps[0] - gaps[1]
    if closing != gaps[1] - gaps[2]:
        return None
    if direction == "NE":
        return first // closing if closing and first % closing == 0 and first // closing >= 0 else None
    if closing <= 0:
        return None
    return max(0, first // closing + 1 if direction in ("LE", "GE") else -(-first // closing))


def _compared(
    computations: Mapping[str, Computation], computation: Computation, name: str, given: Mapping[int, Any]
) -> tuple[str, int, int] | None:
    """Returns direction and both sides if the value is a comparison, else None."""
    x = computation.instructions[name]
    values = [_value(computations, computation, operand, given) for operand in x.operands]
    if x.opcode in ("fusion", "call"):
        inner = computations[x.called("calls" if x.opcode == "fusion" else "to_apply")]
        return _compared(computations, inner, inner.root, dict(enumerate(values)))
    if x.opcode in _SAME_VALUE:
        return _compared(computations, computation, x.operands[0], given)
    if x.opcode != "compare" or not all(isinstance(value, int) for value in values):
        return None
    direction = x.called("direction")
    return None if direction == "EQ" else (direction, *values)


def _value(
    computations: Mapping[str, Computation],
    computation: Computation,
    name: str,
    given: Mapping[int, Any],
    known: dict[str, Any] | None = None,
) -> Any:
    """Evaluates a value to an integer, or a list of them, from constants and the given parameters; else None.

    `known` caches values of the same computation.
    """
    x = computation.instructions[name]
    known = {} if known is None else known

    def of(operand: str) -> Any:
        if operand not in known:
            known[operand] = _value(computations, computation, operand, given, known)
        return known[operand]

    if x.opcode == "constant":
        return int(x.literal) if re.fullmatch(r"-?\d+", x.literal) else None
    if x.opcode == "parameter":
        return given.get(int(x.literal))
    if x.opcode == "tuple":
        return [of(operand) for operand in x.operands]
    if x.opcode == "get-tuple-element":
        whole = of(x.operands[0])
        return whole[int(x.called("index"))] if isinstance(whole, list) else None
    if x.opcode in _SAME_VALUE:
        return of(x.operands[0])
    if x.opcode in _ARITHMETIC:
        left, right = of(x.operands[0]), of(x.operands[1])
        return (
            _ARITHMETIC[x.opcode](left, right) if isinstance(left, int) and isinstance(right, int) else None
        )
    if x.opcode == "fusion":
        inner = computations[x.called("calls")]
        return _value(computations, inner, inner.root, dict(enumerate(map(of, x.operands))))
    return None
