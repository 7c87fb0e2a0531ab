"""Formats numbers and tables as text."""

from __future__ import annotations

import io
from collections.abc import Sequence

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text


def duration(seconds: float) -> str:
    """Formats seconds as `8.3 s`, `4 min 05 s` or `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float, low: float, high: float) -> str:
    """Formats a fraction and its interval: `80.0% [49.0, 94.3]`."""
    return f"{100 * share:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells as an aligned Markdown table; the first row is the header."""
    head, *body = rows
    grid = rich.table.Table(box=rich.box.MARKDOWN)
    for i, title in enumerate(head):
        grid.add_column(rich.text.Text(title), justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        grid.add_row(*(rich.text.Text(cell) for cell in row))
    text = io.StringIO()
    console = rich.console.Console(file=text, width=10_000, color_system=None)
    console.print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
