"""What all samplings share: how tokens are drawn, and what of the devices they may take."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from espl_jax.sampling.sizes import CHUNK
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and where rows end.

    Attributes:
      max_new_tokens: most new tokens of each row, tokens appended between turns included. An int array that
        broadcasts to [M, B, N] limits each row by itself; rows limited to 0 are never run.
      temperature: logits are divided by it; 0 takes the most likely token.
      truncation: top-k, top-p and min-p; by default nothing is cut.
      stop_ids: ids of tokens that end a turn. None for those of the model, where there is one that knows
        them, and else for none.
      context_limit: most tokens of a row with its prompt; None for what the model was made for.
      max_first_turn: most tokens of a row before anything is appended to it; a row that gets there ends,
        truncated. None for no such limit.
    """

    max_new_tokens: int | np.ndarray
    temperature: float = 1.0
    truncation: Truncation = UNTRUNCATED
    stop_ids: tuple[int, ...] | None = None
    context_limit: int | None = None
    max_first_turn: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature}: give 0 for the most likely token, or a positive number"
            )
        if np.max(self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """What sampling may take of the devices, and which programs it shares.

    Attributes:
      max_rows: M times as many rows are in flight at once, whatever their system prompts. None for as many
        as fit into memory, reckoned from its size, whatever else runs on the machine; see `choose_sizes`.
      held_bytes: memory of each device that stays taken. None for that of the params and of their copy that
        is laid out for sampling.
      longest_problem: tokens of the longest problem that this call and later ones may bring; such calls share
        their programs.
      chunk: decode steps between two looks at which rows are done; 1 while a row is constrained.
      coarse: compile fewer programs, see `Sizes`; always so under a constraint.
      mesh: rows are sharded over its data axes; None for one device.
    """

    max_rows: int | None = None
    held_bytes: int | None = None
    longest_problem: int = 0
    chunk: int = CHUNK
    coarse: bool = False
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_rows", self.max_rows), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
