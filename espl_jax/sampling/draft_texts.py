"""The texts in which drafts are looked up, kept by the host between chunks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from espl_jax.parallel import sharding
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.drafts import NGRAM, NOTHING, Texts

MOST_SHARED = 65_536
"""Most tokens of other texts that are searched for a row; of longer ones, the latest."""


def shared_columns(rows: int, new_tokens: int) -> int:
    """Returns the columns of the texts on a problem with this many rows: theirs, and as many earlier ones."""
    return bucket(min(2 * rows * (NGRAM + new_tokens + 1), MOST_SHARED))


class DraftTexts:
    """The text of every row, and the texts on every problem."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        problems: np.ndarray,
        past: Sequence[Sequence[Sequence[int] | np.ndarray]],
        *,
        own_columns: int,
        new_tokens: int,
        mesh: Mesh | None,
    ):
        """Begins with the prompts and the earlier texts.

        Args:
          prompts: the prompt of every row.
          problems: int [rows], index of each row's problem.
          past: earlier texts on each of the B problems, the latest last.
          own_columns: most tokens of a row with its prompt.
          new_tokens: most new tokens of a row.
          mesh: the mesh, or None.
        """
        self._mesh, self._problem = mesh, problems.astype(np.int32)
        self._prompt = np.array([len(prompt) for prompt in prompts], np.int32)
        self._own = np.full((len(prompts), own_columns), NOTHING, np.int32)
        self._length = self._prompt.copy()
        for row, prompt in zip(self._own, prompts, strict=True):
            row[: len(prompt)] = prompt
        # The last tokens of a prompt, from which drafts find the beginning of a text.
        self._ends = {
            problem: list(prompt[-NGRAM:]) for problem, prompt in zip(problems.tolist(), prompts, strict=True)
        }
        columns = shared_columns(len(prompts) // len(past), new_tokens)
        self._shared = np.full((len(past), columns), NOTHING, np.int32)
        self._filled = np.zeros(len(past), int)
        self._on_device: jax.Array | None = None
        for problem, texts in enumerate(past):
            for text in texts:
                self._add(problem, text)

    def write(self, row: int, position: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Replaces the tokens of a row from `position` tokens after its prompt on."""
        column = int(self._prompt[row]) + position
        own = self._own[row]
        own[column:] = NOTHING
        own[column : column + len(tokens)] = tokens
        self._length[row] = column + len(tokens)

    def share(self, row: int, tokens: np.ndarray) -> None:
        """Adds the new tokens of a finished row to the texts on its problem."""
        self._add(int(self._problem[row]), tokens)

    def _add(self, problem: int, tokens: Sequence[int] | np.ndarray) -> None:
        shared = self._shared[problem]
        text = [*self._ends[problem], *tokens, NOTHING][-len(shared) :]
        excess = self._filled[problem] + len(text) - len(shared)
        if excess > 0:  # drop the oldest
            shared[:-excess] = shared[excess:].copy()
            self._filled[problem] -= excess
        start = self._filled[problem]
        shared[start : start + len(text)] = text
        self._filled[problem] += len(text)
        self._on_device = None

    def of_rows(self, numbers: np.ndarray) -> Texts:
        """Returns the texts for a chunk of rows with these numbers, -1 for none."""
        shared = self._on_device
        if shared is None:
            copied = self._shared.copy()
            shared = jax.device_put(copied) if self._mesh is None else sharding.replicate(copied, self._mesh)
            self._on_device = shared
        there = numbers >= 0
        own = np.where(there[:, None], self._own[numbers], NOTHING)
        length = np.where(there, self._length[numbers], 1)
        problem = np.where(there, self._problem[numbers], 0)
        placed = sharding.place_rows((problem, own, length), self._mesh)
        return Texts(shared, *placed)
