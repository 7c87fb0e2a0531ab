"""Shows a run on a terminal, or as plain lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from espl_jax.console.tables import duration
from espl_jax.watch.run_view import RunView
from espl_jax.watch.text import number, safe, sparkline

_STATES = {"running": "green", "finished": "cyan", "stopped": "yellow", "lost": "red", "unknown": "yellow"}
_SAID = {"lost": "process gone", "unknown": "state unknown"}
_TEXT_LINES = 4


def render(view: RunView, width: int) -> RenderableType:
    """Returns the whole view, for a terminal of that many columns."""
    parts: list[RenderableType] = [_head(view, width)]
    if view.warnings:
        lines = [Text(f"! {safe(line)}", style="yellow") for line in view.warnings]
        parts.append(Panel(Group(*lines), title="Warnings", title_align="left", border_style="yellow"))
    if view.results:
        lines = [Text(safe(line)) for line in view.results]
        parts.append(Panel(Group(*lines), title="Test", title_align="left", border_style="cyan"))
    if view.curves:
        parts.append(Panel(_curves(view, width - 4), title="Curves", title_align="left"))
    if view.best:
        parts.append(Panel(_best(view), title="Best prompts", title_align="left"))
    if view.edits:
        parts.append(Panel(_edits(view), title="Last edits", title_align="left"))
    return Group(*parts)


def line(view: RunView) -> str:
    """Returns one plain line about the run."""
    said = [f"{view.iteration} of {view.num_iterations} iterations", _SAID.get(view.state, view.state)]
    said += [f"{title} {number(values[-1])}" for title, values in list(view.curves.items())[:3]]
    said += [f"best prompt {each.id} ({each.mu:.2f} ± {each.sigma:.2f})" for each in view.best[:1]]
    if view.phase:
        said.append(safe(view.phase[0]))
    if view.seconds_left is not None:
        said.append(f"{duration(view.seconds_left)} left")
    return "  ".join(said)


def _head(view: RunView, width: int) -> RenderableType:
    state = Text(_SAID.get(view.state, view.state), style=f"bold {_STATES[view.state]}")
    state.append(f"  {view.iteration} of {view.num_iterations} iterations", style="default not bold")
    if view.checkpoint is None:
        state.append(", no checkpoint yet", style="default not bold")
    elif view.checkpoint != view.iteration:
        state.append(f", checkpoint of {view.checkpoint}", style="default not bold")
    room = max(8, width - 4)
    done = round(room * min(1.0, view.iteration / max(1, view.num_iterations)))
    bar = Text("━" * done, style=_STATES[view.state]).append("┄" * (room - done), style="dim")
    rows: list[RenderableType] = [state, bar]
    if view.phase:
        rows.append(Text(f"{safe(view.phase[0])} for {duration(view.phase[1])}"))
    rates = []
    if view.seconds_per_iteration is not None:
        rates.append(f"{duration(view.seconds_per_iteration)} per iteration")
    if view.tokens_per_second is not None:
        rates.append(f"{number(view.tokens_per_second)} tokens/s in rollouts")
    if view.seconds_left is not None:
        rates.append(f"{duration(view.seconds_left)} left")
    if rates:
        rows.append(Text(", ".join(rates)))
    return Panel(Group(*rows), title=Text(safe(view.title)), title_align="left")


def _curves(view: RunView, width: int) -> RenderableType:
    room = width - max(map(len, view.curves)) - 11  # beside the title and the newest value
    spreads = room >= 26
    bars = room - 18 if spreads else max(1, room)
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "right", "left", "left")[: 3 + spreads]:
        table.add_column(justify=justify, no_wrap=True)
    for title, values in view.curves.items():
        spread = Text(f"{number(min(values))}..{number(max(values))}", style="dim")
        row = [Text(title), Text(number(values[-1]), style="bold"), sparkline(values, bars)]
        table.add_row(*row, *([spread] if spreads else []))
    return table


def _best(view: RunView) -> RenderableType:
    rows = []
    for member in view.best:
        rows.append(Text(f"{member.id}  {member.mu:.2f} ± {member.sigma:.2f}", style="bold"))
        text = member.render() or "(empty: the template's default)"
        rows += _shortened(text.splitlines())
    return Group(*rows)


def _edits(view: RunView) -> RenderableType:
    rows = []
    for heading, lines in view.edits:
        rows.append(Text(safe(heading), style="bold"))
        rows += _shortened(lines)
    return Group(*rows)


def _shortened(lines: Sequence[str]) -> list[Text]:
    kept = [each for each in lines if each.strip()]
    more = [f"... {len(kept) - _TEXT_LINES} more lines"] if len(kept) > _TEXT_LINES else []
    # Text is never parsed as markup.
    return [
        Text(f"  {safe(each)}", no_wrap=True, overflow="ellipsis") for each in [*kept[:_TEXT_LINES], *more]
    ]
