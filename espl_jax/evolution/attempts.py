"""What a mutation reflects on: which problems, which attempts at them, and how these are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from espl_jax.evolution.edit_text import clean
from espl_jax.evolution.settings import Reflection
from espl_jax.types import Rollouts

NOT_SHOWN = "(not shown)"


class Attempt(NamedTuple):
    """The place of a rollout: slot, problem, sample."""

    slot: int
    problem: int
    sample: int


def choose_attempts(
    rollouts: Rollouts, slots: Sequence[int], settings: Reflection, rng: np.random.Generator
) -> list[list[Attempt]]:
    """Returns the attempts to reflect on, one list for each problem, in the order of the batch.

    Args:
      rollouts: the iteration's.
      slots: of the prompt that reflects; copies are pooled.
      settings: `problems`, `max_problems` and `max_attempts`.
      rng: draws where there are more of either.
    """
    rewards, success = rollouts.rewards[slots], rollouts.success[slots]
    mixed = rewards.max(axis=(0, 2)) > rewards.min(axis=(0, 2))
    failed = ~success.any(axis=(0, 2))
    match settings.problems:
        case "mixed":
            wanted = mixed
        case "failed":
            wanted = failed
        case "all":
            wanted = np.ones_like(mixed)
        case _:
            wanted = mixed if mixed.any() else failed
    problems = np.flatnonzero(wanted)
    if settings.max_problems and len(problems) > settings.max_problems:
        problems = np.sort(rng.choice(problems, settings.max_problems, replace=False))
    chosen = []
    for b in problems.tolist():
        attempts = [Attempt(i, b, j) for i in slots for j in range(rollouts.rewards.shape[2])]
        chosen.append(_drawn(attempts, rollouts, settings.max_attempts, rng))
    return chosen


def _drawn(attempts: list[Attempt], rollouts: Rollouts, most: int, rng: np.random.Generator) -> list[Attempt]:
    """Draws at most `most` attempts, half of them right if possible; of an odd number more are wrong."""
    if not most or len(attempts) <= most:
        return attempts
    order = rng.permutation(len(attempts)).tolist()
    right = [i for i in order if rollouts.success[attempts[i]]]
    wrong = [i for i in order if not rollouts.success[attempts[i]]]
    of_right = min(len(right), max(most // 2, most - len(wrong)))
    return [attempts[i] for i in sorted(right[:of_right] + wrong[: most - of_right])]


def verdict(rollouts: Rollouts, attempt: Attempt) -> str:
    """`right` or `wrong`, with the reward where it says more than that."""
    success, reward = bool(rollouts.success[attempt]), float(rollouts.rewards[attempt])
    word = "right" if success else "wrong"
    return word if reward == success else f"{word} (reward {reward:.3g})"


def is_summarized(rollouts: Rollouts, attempt: Attempt, settings: Reflection) -> bool:
    """Whether an attempt is summarized before it is shown."""
    i, b, j = attempt
    return "summary" in settings.show and len(rollouts.replies[i][b][j]) >= settings.verbatim_chars


def summary_values(rollouts: Rollouts, attempt: Attempt, settings: Reflection) -> dict[str, str]:
    """What the template `summary` is filled with."""
    i, b, j = attempt
    problem, shown = rollouts.problems[b], settings.show
    return {
        "problem": problem.text,
        "answer": (problem.answer if "gold" in shown else "") or NOT_SHOWN,
        "attempt": rollouts.replies[i][b][j] or "(nothing)",
        "taken": rollouts.answers[i][b][j] or "(none found)",
        "verdict": verdict(rollouts, attempt) if "verdict" in shown else NOT_SHOWN,
        "feedback": (rollouts.feedback_on(*attempt) if "feedback" in shown else "") or "(none)",
    }


def problem_values(
    rollouts: Rollouts,
    attempts: Sequence[Attempt],
    summaries: dict[Attempt, str | None],
    settings: Reflection,
) -> dict[str, str]:
    """What a template is told about one problem: `problem`, `answer`, `attempts`, and all of it as `case`.

    Args:
      rollouts: the iteration's.
      attempts: at one problem.
      summaries: of those that were summarized; None where the reflector gave none.
      settings: what is shown.
    """
    problem, shown = rollouts.problems[attempts[0].problem], settings.show
    said: dict[str, list[int]] = {}
    for number, attempt in enumerate(attempts, start=1):
        if "feedback" in shown and (feedback := rollouts.feedback_on(*attempt)):
            said.setdefault(feedback, []).append(number)
    attempted = []
    if {"summary", "trajectory", "verdict"} & {*shown}:
        # Without feedback that names them, attempts need no numbers.
        attempted = [
            f"{f'{number}.' if said else '-'} {_shown(rollouts, attempt, summaries, settings)}"
            for number, attempt in enumerate(attempts, start=1)
        ]
    feedback = [
        f"Feedback on {_whose(numbers, len(attempts), bool(attempted))}: {text}"
        for text, numbers in said.items()
    ]
    lines = [*attempted, *feedback]
    task = [f"Task: {problem.text}"] if "task" in shown else []
    # Problems with many right answers have none to show.
    task += [f"Correct answer: {problem.answer}"] if "gold" in shown and problem.answer else []
    return {
        "problem": problem.text if "task" in shown else NOT_SHOWN,
        "answer": (problem.answer if "gold" in shown else "") or NOT_SHOWN,
        "attempts": "\n".join(lines) or "(none)",
        "case": "\n".join([*task, *(["Attempts:"] if attempted else []), *lines]),
    }


def _whose(numbers: Sequence[int], count: int, listed: bool) -> str:
    """Which attempts of `count` some feedback is about: by number if they are listed."""
    if len(numbers) == count:
        return "all attempts"
    if not listed:
        return f"{len(numbers)} of {count} attempts"
    return f"attempt{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _shown(
    rollouts: Rollouts, attempt: Attempt, summaries: dict[Attempt, str | None], settings: Reflection
) -> str:
    i, b, j = attempt
    text = ""
    if attempt in summaries:
        text = clean(summaries[attempt]).removeprefix("Summary:").strip() or "(no summary)"
    elif {"summary", "trajectory"} & {*settings.show}:
        text = rollouts.replies[i][b][j].strip() or "(nothing)"
    judged = verdict(rollouts, attempt) if "verdict" in settings.show else ""
    return ": ".join(filter(None, (judged, text.replace("\n", "\n  "))))
