"""HBM traffic and flops of a compiled TPU program, counted from its optimized, scheduled HLO text.

The compiler's own estimate counts loop bodies once, includes on-chip traffic, and ignores custom kernels.
Here, loop bodies are multiplied by trip counts, and each operation counts its operands and results in HBM:

- Arrays in another memory space (`S(1)` etc.) are not in HBM and count 0.
- For an operand that is only sliced, only the slices count; for an in-place update, only the update.
- Asynchronous pairs read at the start and write at the end.
- Bytes are those of the padded layout: `bf16[36,1,64]{2,1,0:T(8,128)(2,1)}` has 36 * 8 * 128 elements.
- A grouped product reads one expert for each of its rows, and never more than the device has in one layer.
- Of a conditional, the branch with the most traffic counts.

Flops are those of dots and convolutions, two per multiply-add; elementwise work is not counted.

Not counted, since the text does not show it: blocks that an operation reads more than once, communication
between devices, and which parts of its operands a custom kernel reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from espl_jax.plan.hlo.loops import trip_count
from espl_jax.plan.hlo.products import experts, flops
from espl_jax.plan.hlo.text import Computation, Instruction, parse


@dataclasses.dataclass(frozen=True)
class Operation:
    """The cost of an instruction in one execution of the program.

    Attributes:
      name, opcode: as in the program.
      op_name: the path of the traced function, or empty.
      executions: number of executions.
      read, written: bytes of HBM, over all executions.
      flops: flops over all executions.
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
    """The cost of one execution of a program on one device.

    Attributes:
      read, written: bytes of HBM.
      flops: flops of dots and convolutions.
      by_operation: all operations with a cost, most bytes first.
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
    """Counts the HBM traffic and flops of one execution of a compiled program on one device.

    Args:
      text: `compiled.as_text()` of a program compiled for TPU.
      unknown_trips: trip counts that the program does not determine, by the name of the loop or the end of
        its op_name, e.g. `{"jit(decode_chunk)/while": 32}`.

    Returns:
      Bytes of HBM and flops, in total and by operation.

    Raises:
      ValueError: for a loop with unknown trip count, or text that is not an HLO program.
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
    """Formats the operations with the most traffic: gigabytes, share, executions, name and op_name."""
    lines = []
    for x in counted.by_operation[:largest]:
        share = 100 * x.total / max(counted.total, 1)
        lines.append(f"{x.total / 1e9:9.4f} GB {share:5.1f}% {x.executions:6d} x {x.name}  {x.op_name}")
    return "\n".join(lines)


# Operations that only name existing memory and move nothing.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("opt-barrier", "partition-id", "replica-id", "async-update"),
)
# Operations that read only a part of their first operand, of the size of their result.
_TAKES = ("slice", "dynamic-slice", "gather")
# Operations that write into their first operand -> index of the operand with the update.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
# Operations for which a part of the result needs an equally large part of the operand.
_ELEMENT_BY_ELEMENT = ("bitcast", "convert", "copy", "pad", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class _Counter:
    """The computations of a program, and the trip counts given by the caller."""

    computations: Mapping[str, Computation]
    unknown_trips: Mapping[str, int]

    def cost(self, name: str) -> list[Operation]:
        """Returns the costs of one execution of a computation, including loops and branches."""
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
        """Returns bytes of HBM read and written by one execution of an instruction."""
        if x.opcode in _FREE or (x.opcode == "custom-call" and "AllocateBuffer" in x.attributes):
            return 0, 0
        kind = re.sub(r"-(start|done)$", "", x.opcode)
        if kind == "async" and "calls=" in x.attributes:
            # In dumps, a slice-start has the slice in a separate computation.
            called = self.computations[x.called("calls")]
            kind = called.instructions[called.root].opcode
        operands = [computation.instructions[name] for name in x.operands]
        if x.opcode.endswith("-done"):
            return 0, x.hbm_bytes
        if x.opcode == "fusion":
            return self.moved_by_fusion(operands, x)
        whole = {operand.name: operand.hbm_bytes for operand in operands}
        if kind == "custom-call" and (found := experts(x)):
            # A grouped product reads the matrices of experts that have rows, out of those of all layers.
            matrices = [operand for operand in operands if len(operand.arrays[0].dims) == 2]
            rows = min((operand.arrays[0].dims[0] for operand in matrices), default=0)
            for operand in operands:
                dims = operand.arrays[0].dims
                if len(dims) == 3:
                    whole[operand.name] = operand.hbm_bytes * min(found[0], rows, dims[0]) // dims[0]
        if kind in _TAKES:
            # In a -start operation, the result comes after the operands.
            taken = x.arrays[len(operands) if x.opcode.endswith("-start") else 0].bytes
            whole[operands[0].name] = min(whole[operands[0].name], taken)
        written = 0 if x.opcode.endswith("-start") else x.hbm_bytes
        if kind in _UPDATES and operands[0].arrays[0].on_hbm == x.arrays[0].on_hbm:
            whole.pop(operands[0].name)
            written = min(written, operands[_UPDATES[kind]].bytes)
        return sum(whole.values()), written

    def moved_by_fusion(self, operands: list[Instruction], x: Instruction) -> tuple[int, int]:
        """Returns bytes read and written by a fusion, from what its computation reads and writes."""
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
        """Returns (bytes of the update, parameter number) if a value is a parameter updated in place."""
        x = fused.instructions[name]
        if x.opcode == "bitcast":
            return self.update(fused, x.operands[0])
        if x.opcode == "fusion":
            inner = self.computations[x.called("calls")]
            found = self.update(inner, inner.root)
            if found is None:
                return None
            target = self.parameter(fused, x.operands[found[1]])
            return None if target is None else (found[0], target)
        if x.opcode in _UPDATES:
            target = self.parameter(fused, x.operands[0])
            update = fused.instructions[x.operands[_UPDATES[x.opcode]]]
            return None if target is None else (update.bytes, target)
        return None

    def parameter(self, fused: Computation, name: str) -> int | None:
        """Returns the number of the parameter that a value aliases, or is in another tiling; else None."""
        x = fused.instructions[name]
        while True:
            if x.opcode == "bitcast":
                x = fused.instructions[x.operands[0]]
            elif (
                x.opcode == "fusion" and (number := _relaid(self.computations[x.called("calls")])) is not None
            ):
                source = fused.instructions[x.operands[number]]
                if source.bytes != x.bytes:
                    return None
                x = source
            else:
                return int(x.literal) if x.opcode == "parameter" else None

    def taken(self, fused: Computation, name: str, in_place: bool) -> int:
        """Returns the bytes of a value that its users in a fusion read; an in-place update reads none."""
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
                if places == [_relaid(inner)]:  # int8 in another tiling, of which a part is sliced or updated
                    updated = in_place and user.bytes == x.bytes
                    needed += self.taken(fused, user.name, updated) * x.bytes // max(user.bytes, 1)
                    continue
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
    """Returns the names of the results of a fused computation."""
    root = fused.instructions[fused.root]
    return list(root.operands) if root.opcode == "tuple" else [root.name] * len(root.arrays)


def _relaid(fused: Computation) -> int | None:
    """Returns the number of a parameter that a computation only casts or copies to a new layout, or None."""
    x = fused.instructions[fused.root]
    while x.opcode in _ELEMENT_BY_ELEMENT:
        x = fused.instructions[x.operands[0]]
    return int(x.literal) if x.opcode == "parameter" else None
