"""Parses optimized HLO text, as printed by `compiled.as_text()`."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape, with its layout.

    Attributes:
      dims: logical dimensions.
      bytes: bytes of the padded layout.
      on_hbm: whether it is in the default memory space.
    """

    dims: tuple[int, ...]
    bytes: int
    on_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: unique in the program.
      arrays: the result, or every array of a (nested) tuple in order.
      opcode: as printed.
      operands: names of operands, in the same computation.
      literal: the text in parentheses.
      attributes: the text after the parentheses.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def bytes(self) -> int:
        """Padded bytes of all result arrays, in any memory."""
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        """Padded bytes of the result arrays in HBM."""
        return sum(array.bytes for array in self.arrays if array.on_hbm)

    @property
    def op_name(self) -> str:
        """The path of the traced function, or empty."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """Returns the name of the computation in `attribute=%...`."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.attributes)
        assert found is not None
        return found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and the name of the root."""

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(x.literal): x.name for x in self.instructions.values() if x.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that use each name as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns (computations by name, name of the entry computation)."""
    computations, entry, header, instructions, root = {}, "", None, {}, ""
    for line in _lines(text):
        if (
            line[:1] in ("%", "E")
            and line.endswith("{")
            and (found := re.match(r"(ENTRY )?%?([\w.\-]+)", line))
        ):
            header, instructions, root = found[2], {}, ""
            entry = header if found[1] else entry
        elif line.startswith("}") and header:
            computations[header], header = Computation(instructions, root), None
        elif header and (found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction.name if found[1] else root
    if not entry:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text(), the optimized HLO")
    return computations, entry


def _lines(text: str) -> Iterator[str]:
    """Yields one line per instruction: the attributes of kernels may contain line breaks."""
    begun = ""
    for line in text.splitlines():
        line = f"{begun} {line}" if begun else line
        begun = "" if not line.startswith("  ") or _closed_braces(line) else line
        if not begun:
            yield line


def _closed_braces(line: str) -> bool:
    """Returns whether all braces outside strings are closed."""
    if line.count("{") == line.count("}"):
        return True
    bare = _STRING.sub("", line)
    return bare.count("{") <= bare.count("}")


def _instruction(name: str, text: str) -> Instruction:
    shape, rest = _closed(text) if text.startswith("(") else text.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    literal, attributes = _closed("(" + rest)
    arrays = tuple(_array(*found) for found in _ARRAY.findall(shape))
    literal = literal[1:-1]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", literal))
    if literal and not operands and opcode not in ("constant", "parameter"):
        raise ValueError(f"{name} = {text[:80]}: operands without %; give the unchanged compiled.as_text()")
    return Instruction(name, arrays, opcode, operands, literal, attributes)


def _closed(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[: found.end()], text[found.end() :]
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
    order, _, tiling = layout.partition(":")
    physical = [sizes[int(axis)] for axis in reversed(order.split(","))] if order else list(sizes)
    tiles = re.search(r"T((?:\([\d,]*\))+)", tiling)
    for tile in re.findall(r"\(([\d,]+)\)", tiles[1]) if tiles else ():
        # A tile splits the minor dimensions into (count, tile); the next tile splits the result.
        tile = [int(size) for size in tile.split(",")]
        physical = [1] * (len(tile) - len(physical)) + physical
        minor = physical[-len(tile) :]
        physical[-len(tile) :] = [-(-size // step) for size, step in zip(minor, tile, strict=True)] + tile
    bits = re.search(r"\d+", dtype)  # bf16, s4, f8e4m3fn; tokens have none
    bits = 8 if dtype == "pred" else int(bits[0]) if bits else 0
    space = re.search(r"S\((\d+)\)", tiling)
    return Array(sizes, -(-math.prod(physical) * bits // 8), not space or space[1] == "0")
