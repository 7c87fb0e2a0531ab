"""HBM traffic and flops of a compiled TPU program, counted from its optimized, scheduled HLO text.

The compiler's own estimate counts a loop's body once, traffic inside of the chip as bytes, and custom kernels
not at all. Here loops are multiplied, and an operation costs, once, the operands and results it has in HBM:

- A layout with a memory space (`S(1)` and so on) is not HBM and costs nothing.
- An operand of which only slices are taken costs those slices; an update in place costs the update, written.
- Asynchronous pairs read where they start and write where they are done.
- Bytes are those of the padded layout, which is what moves: `bf16[36,1,64]{2,1,0:T(8,128)(2,1)}` has
  36 * 8 * 128 elements.
- Of a conditional, the branch that moves more.

Flops are those of dots and convolutions, two for each product needed; elementwise work is not counted.

What the text does not show is not counted: blocks that one operation fetches more than once, what collectives
do between devices, and which parts of its operands a custom kernel really reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from espl_jax.plan.hlo.loops import trip_count
from espl_jax.plan.hlo.products import flops
from espl_jax.plan.hlo.text import Computation, Instruction, parse


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction costs over the whole execution.

    Attributes:
      name, opcode: as the program has them.
      op_name: the path of the traced function that it came from, or nothing.
      executions: how often it runs.
      read, written: bytes of HBM, over all its executions.
      flops: over all its executions.
    """

    name: str
    opcode: str
    op_name: str
    executions: int
    read: int
    written: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a program costs one device.

    Attributes:
      read, written: bytes of HBM.
      flops: of dots and convolutions.
      by_operation: every operation that costs anything, the most bytes first.
    """

    read: int
    written: int
    flops: int
    by_operation: tuple[Operation, ...]

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def traffic(text: str, unknown_trips: Mapping[str, int] | None = None) -> Traffic:
    """Counts what one execution of a compiled program moves between HBM and the chip, on one device.

    Args:
      text: `compiled.as_text()` of a program compiled for TPU.
      unknown_trips: how often loops run whose count the program does not hold, by the end of their op_name
        or by their name in the program, e.g. `{"jit(decode_chunk)/while": 32}`.

    Returns:
      Bytes of HBM and flops, in total and by operation.

    Raises:
      ValueError: for a loop without a count, or text that is no HLO program.
    """
    computations, entry = parse(text)
    counter = _Counter(computations, dict(unknown_trips or {}))
    operations = sorted(counter.cost(entry), key=lambda x: (-x.total, -x.flops))
    return Traffic(
        sum(x.read for x in operations),
        sum(x.written for x in operations),
        sum(x.flops for x in operations),
        tuple(operations),
    )


def breakdown(counted: Traffic, largest: int = 15) -> str:
    """The operations that move most, one a line: gigabytes, share, executions, name and origin."""
    lines = []
    for x in counted.by_operation[:largest]:
        share = 100 * x.total / max(counted.total, 1)
        lines.append(f"{x.total / 1e9:9.4f} GB {share:5.1f}% {x.executions:6d} x {x.name}  {x.op_name}")
    return "\n".join(lines)


# Names of what already lies in memory; a new name moves nothing.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("opt-barrier", "partition-id", "replica-id", "async-update"),
)
# Operations that take a part of their first operand, as large as their result.
_TAKES = ("slice", "dynamic-slice", "gather")
# Operations that write into their first operand, and which operand holds what they write.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
# Operations of which a part needs as large a part of their operand.
_ELEMENT_BY_ELEMENT = ("bitcast", "convert", "copy", "pad", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class _Counter:
    """The computations of one program, and the trip counts that the caller knows."""

    computations: Mapping[str, Computation]
    unknown_trips: Mapping[str, int]

    def cost(self, name: str) -> list[Operation]:
        """What one run of a computation costs, loops and branches included."""
        computation = self.computations[name]
        operations: list[Operation] = []
        for x in computation.instructions.values():
            if x.opcode == "while":
                trips = trip_count(self.computations, computation, x, self.unknown_trips)
                for part in ("condition", "body"):
                    operations += [_times(trips, inner) for inner in self.cost(x.called(part))]
            elif x.opcode == "conditional":
                branches = [self.cost(branch) for branch in _branches(x)]
                operations += max(branches, key=lambda branch: sum(inner.total for inner in branch))
            elif x.opcode == "call":
                operations += self.cost(x.called("to_apply"))
            else:
                read, written = self.moved(computation, x)
                products = flops(self.computations, computation, x)
                if read or written or products:
                    operations.append(Operation(x.name, x.opcode, x.op_name, 1, read, written, products))
        return operations

    def moved(self, computation: Computation, x: Instruction) -> tuple[int, int]:
        """Bytes of HBM that one execution of an instruction reads and writes."""
        if x.opcode in _FREE or (x.opcode == "custom-call" and "AllocateBuffer" in x.attributes):
            return 0, 0
        kind = re.sub(r"-(start|done)$", "", x.opcode)
        if kind == "async" and "calls=" in x.attributes:
            # As dumps write a slice-start: with the slice in a computation of its own.
            called = self.computations[x.called("calls")]
            kind = called.instructions[called.root].opcode
        operands = [computation.instructions[name] for name in x.operands]
        if x.opcode.endswith("-done"):
            return 0, x.hbm_bytes
        if x.opcode == "fusion":
            return self.moved_by_fusion(operands, x)
        whole = {operand.name: operand.hbm_bytes for operand in operands}
        if kind in _TAKES:
            # Where it starts, the result comes behind the operands.
            taken = x.arrays[len(operands) if x.opcode.endswith("-start") else 0].bytes
            whole[operands[0].name] = min(whole[operands[0].name], taken)
        written = 0 if x.opcode.endswith("-start") else x.hbm_bytes
        if kind in _UPDATES and operands[0].arrays[0].on_hbm == x.arrays[0].on_hbm:
            whole.pop(operands[0].name)
            written = min(written, operands[_UPDATES[kind]].bytes)
        return sum(whole.values()), written

    def moved_by_fusion(self, operands: list[Instruction], x: Instruction) -> tuple[int, int]:
        """The same of a fusion: what its insides take of its operands, and what they write of its results."""
        fused = self.computations[x.called("calls")]
        written, in_place = 0, set()
        for output, array in zip(_outputs(fused), x.arrays, strict=True):
            size, update = array.bytes, self.update(fused, output)
            if update and operands[update[1]].arrays[0].on_hbm == array.on_hbm:
                in_place.add(update[1])
                size = min(size, update[0])
            written += size if array.on_hbm else 0
        read: dict[str, int] = {}
        for number, operand in enumerate(operands):
            if operand.hbm_bytes:
                taken = self.taken(fused, fused.parameters[number], number in in_place)
                read[operand.name] = min(read.get(operand.name, 0) + taken, operand.hbm_bytes)
        return sum(read.values()), written

    def update(self, fused: Computation, name: str) -> tuple[int, int] | None:
        """If a value is a parameter updated in place: bytes of the update, and the parameter's number."""
        x = fused.instructions[name]
        if x.opcode == "bitcast":
            return self.update(fused, x.operands[0])
        if x.opcode == "fusion":
            inner = self.computations[x.called("calls")]
            found = self.update(inner, inner.root)
            if found is None:
                return None
            target = _parameter(fused, x.operands[found[1]])
            return None if target is None else (found[0], target)
        if x.opcode in _UPDATES:
            target = _parameter(fused, x.operands[0])
            update = fused.instructions[x.operands[_UPDATES[x.opcode]]]
            return None if target is None else (update.bytes, target)
        return None

    def taken(self, fused: Computation, name: str, in_place: bool) -> int:
        """Bytes that the users of a value in a fusion need of it; its update in place needs none."""
        x = fused.instructions[name]
        if name in _outputs(fused):
            return x.bytes
        needed = 0
        for user in fused.users[name]:
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            if user.opcode in _TAKES and places == [0]:
                needed += user.bytes
            elif user.opcode in _UPDATES and places == [0] and in_place:
                continue
            elif user.opcode in _ELEMENT_BY_ELEMENT:
                updated = in_place and user.opcode == "bitcast"
                needed += self.taken(fused, user.name, updated) * x.bytes // max(user.bytes, 1)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                needed += sum(self.taken(inner, inner.parameters[i], in_place) for i in places)
            else:
                return x.bytes
        return min(needed, x.bytes)


def _times(count: int, x: Operation) -> Operation:
    return dataclasses.replace(
        x,
        executions=count * x.executions,
        read=count * x.read,
        written=count * x.written,
        flops=count * x.flops,
    )


def _branches(x: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
    if found:
        return re.findall(r"[\w.\-]+", found[1])
    return [x.called("true_computation"), x.called("false_computation")]


def _outputs(fused: Computation) -> list[str]:
    """Names of what a fused computation returns, one for each result."""
    root = fused.instructions[fused.root]
    return list(root.operands) if root.opcode == "tuple" else [root.name] * len(root.arrays)


def _parameter(fused: Computation, name: str) -> int | None:
    """The number of the parameter that a value is, under whatever name; None for anything else."""
    x = fused.instructions[name]
    while x.opcode == "bitcast":
        x = fused.instructions[x.operands[0]]
    return int(x.literal) if x.opcode == "parameter" else None
