"""Settings of sampling: the distribution and limits (`Sampling`), and memory and devices (`Capacity`)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from espl_jax.choices import MOST_DRAFT_TOKENS
from espl_jax.parallel.ahead import OFF, CompileAhead
from espl_jax.sampling.sizes import CHUNK
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling distribution and limits of rows.

    Attributes:
      max_new_tokens: most new tokens of each row, including tokens appended between turns. An int array that
        broadcasts to [M, B, N] sets a limit per row; rows with limit 0 are never run.
      temperature: divides the logits; 0 takes the most likely token.
      truncation: top-k, top-p and min-p; nothing is cut by default.
      stop_ids: ids of tokens that end a turn. None means the model's own for callers that have the model
        (`collect_rollouts`), and no stop tokens in `sample_tree`.
      context_limit: most tokens of a prompt and its row together; None for the model's `max_positions`.
      max_first_turn: most tokens of a row before anything is appended to it; a row that reaches it ends,
        truncated. None for no such limit.
      record_routing: record the choices of experts, if the model has experts.
      draft_tokens: most tokens of a draft, which a decode step checks at once (see `drafts`); 0 for no
        drafts. They save decode steps, and do not change which tokens are drawn, rounding apart. Int8 caches
        round at the ends of chunks, which drafts move.
    """

    max_new_tokens: int | np.ndarray
    temperature: float = 1.0
    truncation: Truncation = UNTRUNCATED
    stop_ids: tuple[int, ...] | None = None
    context_limit: int | None = None
    max_first_turn: int | None = None
    record_routing: bool = False
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.draft_tokens <= MOST_DRAFT_TOKENS:
            raise ValueError(
                f"draft_tokens={self.draft_tokens}: give 1 to {MOST_DRAFT_TOKENS}, or 0 for no drafts"
            )
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature}: give 0 for the most likely token, or a positive number"
            )
        if np.max(self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Memory and devices that sampling may use, and the shapes it compiles for.

    Attributes:
      max_rows: at most M * max_rows rows are in flight, over all lanes together. None fits as many as the
        device memory holds, computed from its total size, not from what is free; see `choose_sizes`.
      held_bytes: bytes per device that are not available to rows. None counts the params and their copy in
        the sampling layout.
      longest_problem: tokens of the longest problem in this call and later ones, so that all of them share
        compiled programs.
      chunk: decode steps between two looks by the host; 1 while any row is constrained.
      coarse: compile fewer programs (see `Sizes`); always on under a constraint.
      mesh: rows are sharded over its data axes; None for a single device.
      ahead: compiles the programs of the call in the background, except for constrained steps.
    """

    max_rows: int | None = None
    held_bytes: int | None = None
    longest_problem: int = 0
    chunk: int = CHUNK
    coarse: bool = False
    mesh: jax.sharding.Mesh | None = None
    ahead: CompileAhead = OFF

    def __post_init__(self) -> None:
        for name, value in (("max_rows", self.max_rows), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
