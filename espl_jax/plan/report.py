"""Formats a plan as text."""

from __future__ import annotations

from espl_jax.console.tables import table
from espl_jax.plan.costs import GIB, Plan


def report(result: Plan) -> str:
    """Formats a plan: memory held, a table row for each program, and whether the run fits."""
    chip, axes = result.chip, ", ".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in result.held.items() if size)
    lines = [f"{result.topology}, {axes or 'one device'}: {chip.memory / GIB:.2f} GiB of HBM per device."]
    lines += [f"Held throughout, GiB per device: {held}."]
    if result.error:
        return "\n".join([*lines, f"It does not fit: {result.error}"])
    lines += [f"Rollouts: {result.slots}.", ""]
    rows = [["program", "shape", "arguments", "temporaries", "held beside", "total GiB", "fits"]]
    rows[0] += ["Tflop", "HBM GB", "bound", "at least ms", "runs"]
    for cost in result.costs:
        program = cost.program
        row = [program.name, program.shape]
        if cost.error:
            rows.append([*row, *[""] * 4, "no", *[""] * 4, f"{program.runs:.0f}"])
            continue
        sizes = cost.arguments, cost.temporaries, cost.beside + cost.outputs, cost.total
        row += [f"{size / GIB:.2f}" for size in sizes] + ["yes" if cost.fits(chip) else "no"]
        by = "flops" if cost.flops / chip.flops > cost.moved / chip.bandwidth else "bytes"
        row += [f"{cost.flops / 1e12:.2f}", f"{cost.moved / 1e9:.2f}", by]
        rows.append([*row, f"{1e3 * cost.bound(chip):.1f}", f"{program.runs:.0f}"])
    lines += [table(rows), ""]
    lines += [
        f"{cost.program.name}, {cost.program.shape}: {cost.error}" for cost in result.costs if cost.error
    ]
    if result.fits:
        lines.append(
            f"It fits: {result.largest / GIB:.2f} of {chip.memory / GIB:.2f} GiB. The longest iteration "
            f"takes at least {result.iteration:.0f} s, without reflection and evaluation."
        )
    else:
        worst = [cost for cost in result.costs if not cost.fits(chip)]
        lines.append(f"It does not fit: {', '.join(dict.fromkeys(cost.program.name for cost in worst))}.")
    return "\n".join(lines)
