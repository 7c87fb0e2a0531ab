"""Problems that the package reasoning-gym generates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from espl_jax import gym
from espl_jax.data.problems import ProblemSet
from espl_jax.data.statements import comparable
from espl_jax.types import Problem

SEEDS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}
"""Split -> the package's seed. Entry i of seed s is generated from s + i, so seeds that are near each other
share entries."""

ATTEMPTS = 100
"""Entries in a row that bring no new problem, after which a task has no more problems; 10 times as many for
the first ones."""


def questions(task: str, options: Mapping[str, str], split: str = "train") -> ProblemSet:
    """Returns the first problems of a task that belong to a split.

    Each question belongs to one of the three splits by a hash of its normalized text, whatever the seed and
    the options are, so splits never overlap. Two thirds of the generated entries are therefore passed over.

    Args:
      task: name of a task of the package.
      options: `count`, the number of problems; `seed`, the package's seed (default: one per split, see
        `SEEDS`); `split`, which replaces the argument; and fields of the task's configuration, as text.
      split: `train`, `validation` or `test`.

    Raises:
      ValueError: for an unknown task, split or option, an unusable value, or a count above the number of
        distinct problems that were found.
    """
    split = options.get("split", split)
    if split not in SEEDS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SEEDS)}")
    gym.fields(task)  # an unknown task is the first thing to complain about
    count = _number("count", options.get("count"), 1)
    seed = _number("seed", options.get("seed", str(SEEDS[split])), 0)
    own = {name: value for name, value in options.items() if name not in ("count", "seed", "split")}
    generated = gym.Task(task, tuple(sorted(own.items())), seed)
    gym.dataset(generated)
    problems: dict[str, Problem] = {}
    index, last = 0, 9 * ATTEMPTS
    while len(problems) < count:
        if index - last > ATTEMPTS + len(problems) or index == gym.SIZES[-1]:
            raise ValueError(
                f"count={count}: only {len(problems)} different problems of the {split} split were found "
                f"among {index} entries; lower count, or widen the options of {task}"
            )
        entry = gym.entry(generated, index)
        key = comparable(entry["question"])
        answer = entry["answer"]
        # A few tasks have entries whose answer is the empty text, which no reply can state.
        if key not in problems and answer != "" and _split_of(key) == split:
            problems[key] = Problem(
                generated.id(index), entry["question"].strip(), "" if answer is None else str(answer)
            )
            last = max(last, index)
        index += 1
    return ProblemSet(tuple(problems.values()), f"{gym.PREFIX}:{task} ({split})")


def _number(option: str, text: str | None, least: int) -> int:
    if text is None:
        raise ValueError(f"missing option {option}; write {option}=200")
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"invalid option {f'{option}={text}'!r}: give an integer, at least {least}")
    return int(text)


def _split_of(key: str) -> str:
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return tuple(SEEDS)[int.from_bytes(digest, "big") % len(SEEDS)]
