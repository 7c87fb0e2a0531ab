"""Earlier rollouts by problem, in which sampling looks up drafts (`sampling.drafts`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espl_jax.sampling.draft_texts import MOST_SHARED
from espl_jax.types import Problem, Rollouts

MOST_TOKENS = 2**25
"""Most tokens that are kept of all problems together: 128 MiB."""

Texts = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Past:
    """The tokens of earlier rollouts.

    The rollouts of a run are in its log, and `of_records` restores from it what a run had kept, so that a
    resumed run drafts the same tokens.

    Attributes:
      texts: id of a problem -> the new tokens of its rollouts, int32 [length] each, the latest last. The
        problem whose latest rollout is the oldest comes first.
    """

    texts: Mapping[str, Texts] = dataclasses.field(default_factory=dict)

    def on(self, problems: Sequence[Problem]) -> list[Texts]:
        """Returns the texts on each problem."""
        return [self.texts.get(problem.id, ()) for problem in problems]

    def with_rollouts(self, rollouts: Rollouts) -> Past:
        """Returns what is kept after an iteration with these rollouts."""
        places = np.ndindex(*rollouts.lengths.shape)
        return self._with(
            (rollouts.problems[place[1]].id, rollouts.tokens[place][: rollouts.lengths[place]])
            for place in places
        )

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> Past:
        """Returns the rollouts of a run from the records of its log (see `rollouts.records`)."""
        return cls()._with((record["problem"], record["tokens"]) for record in records)

    def _with(self, rollouts: Iterable[tuple[str, Sequence[int] | np.ndarray]]) -> Past:
        texts = dict(self.texts)
        total = sum(len(text) for kept in texts.values() for text in kept)
        for problem, tokens in rollouts:
            # A copy: a view would keep all tokens of its iteration, padding included.
            kept = [*texts.pop(problem, ()), np.array(tokens, np.int32)]
            total += len(kept[-1])
            on_problem = sum(map(len, kept))
            while on_problem - len(kept[0]) >= MOST_SHARED:  # too old to be searched
                on_problem -= len(kept[0])
                total -= len(kept.pop(0))
            texts[problem] = tuple(kept)
            while total > MOST_TOKENS and len(texts) > 1:
                oldest = next(iter(texts))
                total -= sum(map(len, texts.pop(oldest)))
        return Past(texts)
