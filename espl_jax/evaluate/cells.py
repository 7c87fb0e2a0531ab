"""Cells of a comparison (one model, one prompt, one problem set each), and their display."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from espl_jax.console.tables import percent, table
from espl_jax.rollouts.evaluation import Evaluation, estimate
from espl_jax.types import Rollouts

HEADS = ("model", "prompt", "data", "problems")
"""Columns that identify a cell."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model under one prompt on one problem set.

    Attributes:
      model, prompt, data: display names.
      system_prompt: text of the prompt.
      evaluation: results of its rollouts.
      truncated: fraction of truncated rollouts.
      new_tokens: mean number of tokens that the model sampled per rollout; tool output is not counted.
    """

    model: str
    prompt: str
    data: str
    system_prompt: str
    evaluation: Evaluation
    truncated: float
    new_tokens: float


def make_cells(batches: Sequence[Rollouts], model: str, prompts: Sequence[str], data: str) -> list[Cell]:
    """Returns one cell per prompt.

    Args:
      batches: at least one batch, with different problems and the same M prompts.
      model, data: display names.
      prompts: display names of the M prompts.
    """

    def whole(field: str) -> np.ndarray:
        return np.concatenate([getattr(batch, field) for batch in batches], axis=1)

    rewards, success, truncated = map(whole, ("rewards", "success", "truncated"))
    new_tokens = np.concatenate([batch.drawn.sum(axis=-1) for batch in batches], axis=1)
    return [
        Cell(
            model=model,
            prompt=name,
            data=data,
            system_prompt=batches[0].prompts[m].render(),
            evaluation=estimate(rewards[m], success[m]),
            truncated=float(truncated[m].mean()),
            new_tokens=float(new_tokens[m].mean()),
        )
        for m, name in enumerate(prompts)
    ]


def show(cells: Sequence[Cell]) -> str:
    """Formats the shared columns as lines and the rest as a Markdown table; a single cell as lines only."""
    rows = [_columns(cell) for cell in cells]
    shared = list(rows[0])
    if len(rows) > 1:
        shared = [name for name in HEADS if len({row[name] for row in rows}) == 1]
    lines = "\n".join(f"{name:<12} {rows[0][name]}" for name in shared)
    titles = [name for name in rows[0] if name not in shared]
    if not titles:
        return lines
    grid = table([titles, *([row[name] for name in titles] for row in rows)])
    return f"{lines}\n\n{grid}" if lines else grid


def _columns(cell: Cell) -> dict[str, str]:
    e = cell.evaluation
    low_high = "unknown" if e.reward_interval is None else "{:.3f}, {:.3f}".format(*e.reward_interval)
    return {
        "model": cell.model,
        "prompt": cell.prompt,
        "data": cell.data,
        "problems": str(e.num_problems),
        "mean reward": f"{e.reward:.3f} [{low_high}]",
        **{f"pass@{k}": percent(share, *e.pass_at_interval[k]) for k, share in e.pass_at.items()},
        "new tokens": f"{cell.new_tokens:.1f}",
        "cut off": f"{100 * cell.truncated:.0f}%",
    }
