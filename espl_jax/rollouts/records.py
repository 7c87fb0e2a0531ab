"""Rollouts as log records, and their mean metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from espl_jax.types import Rollouts

DIGITS = 4
"""Decimals of the logprobs of single tokens: enough to compare tokens, in a third of the bytes."""


def records(
    rollouts: Rollouts, token_logprobs: bool = False, trainer_logprobs: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Returns one plain dict per rollout, for the JSON lines of the work directory.

    Args:
      rollouts: rollouts of M prompts on B problems.
      token_logprobs: add `logprobs`, the sampler's logprob of each token, rounded to `DIGITS` decimals; None
        for tokens that were appended to the conversation.
      trainer_logprobs: float32 [M, B, N, T]; if given, `trainer_logprobs` is added in the same form.
    """

    def rounded(values: np.ndarray, m: int, b: int, n: int) -> list[float | None]:
        length = rollouts.lengths[m, b, n]
        pairs = zip(values[m, b, n, :length].tolist(), rollouts.drawn[m, b, n, :length], strict=True)
        return [round(value, DIGITS) if drawn else None for value, drawn in pairs]

    return [
        {
            "prompt": rollouts.prompts[m].id,
            "problem": rollouts.problems[b].id,
            "slot": m,
            "sample": n,
            "reward": rollouts.rewards[m, b, n],
            "success": rollouts.success[m, b, n],
            "truncated": rollouts.truncated[m, b, n],
            "answer": rollouts.answers[m][b][n],
            "reply": rollouts.replies[m][b][n],
            "feedback": rollouts.feedback_on(m, b, n),
            "environment": {name: values[m, b, n] for name, values in rollouts.metrics.items()},
            "tokens": rollouts.tokens[m, b, n, : rollouts.lengths[m, b, n]],
            "logprob": rollouts.logprobs[m, b, n].sum(dtype=np.float64),
            **({"logprobs": rounded(rollouts.logprobs, m, b, n)} if token_logprobs else {}),
            **(
                {"trainer_logprobs": rounded(trainer_logprobs, m, b, n)}
                if trainer_logprobs is not None
                else {}
            ),
        }
        for m, b, n in np.ndindex(*rollouts.rewards.shape)
    ]


def means(rollouts: Rollouts) -> dict[str, Any]:
    """Returns means over an iteration's rollouts, and the number of groups with unequal rewards."""
    mixed = [
        rollouts.rewards[slots].max(axis=(0, 2)) > rollouts.rewards[slots].min(axis=(0, 2))
        for slots in rollouts.slots().values()
    ]
    environment = {name: values.mean(dtype=np.float64) for name, values in rollouts.metrics.items()}
    return {
        "reward": rollouts.rewards.mean(dtype=np.float64),
        "success": rollouts.success.mean(dtype=np.float64),
        "truncated": rollouts.truncated.mean(dtype=np.float64),
        "new_tokens": rollouts.drawn.sum(axis=-1).mean(dtype=np.float64),
        "mixed_groups": np.sum(mixed),
        "groups": np.size(mixed),
        **({"environment": environment} if environment else {}),
    }
