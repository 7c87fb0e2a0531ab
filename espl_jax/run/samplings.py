"""Every kind of sampling that a run does, at its largest, for `programs` to list what is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.sizes import CHUNK, Sizes, choose_sizes
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the longest of each level: system prompts, problems, and what may follow."""

    system: int
    problem: int
    new: int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """One kind of sampling, at its largest.

    Attributes:
      name: what is sampled.
      phase: `rollouts`, `reflection` or `evaluation`.
      lanes, problems, group: M system prompts, B problems, N samples of each.
      lengths: tokens of the longest of each level.
      longest_problem: tokens that sizes are chosen for.
      greedy: whether the most likely tokens are taken.
      truncation: what cannot be drawn.
      turns: whether tokens may be appended to rows.
      constrained: whether a schema decides before every token what it may be.
      context_limit, max_rows: as `choose_sizes` takes them.
    """

    name: str
    phase: str
    lanes: int
    problems: int
    group: int
    lengths: Lengths
    longest_problem: int
    greedy: bool = False
    truncation: Truncation = UNTRUNCATED
    turns: bool = False
    constrained: bool = False
    context_limit: int | None = None
    max_rows: int | None = None

    @property
    def rows(self) -> int:
        """M * B * N."""
        return self.lanes * self.problems * self.group

    def sizes(
        self, config: DecoderConfig, held: int, mesh: Mesh | None, memory: int | None = None
    ) -> tuple[Sizes, ...]:
        """What it reserves, as `sample_tree` does. Arguments and errors are those of `choose_sizes`."""
        return choose_sizes(
            config,
            lanes=self.lanes,
            rows=self.rows,
            longest_problem=self.longest_problem,
            max_new_tokens=self.lengths.new,
            context_limit=self.context_limit,
            chunk=1 if self.constrained else CHUNK,
            turns=self.turns,
            coarse=self.phase == "reflection",
            max_rows=self.max_rows,
            held=held,
            memory=memory,
            mesh=mesh,
        )


def samplings(
    c: Any,
    config: DecoderConfig,
    lengths: Lengths,
    *,
    longest_problem: int,
    turns: bool,
    evaluated: Mapping[str, int],
    instructions: int,
) -> list[Sampling]:
    """The samplings of a run, the rollouts of an iteration first.

    Args:
      c: the ConfigDict of the run.
      config: the decoder.
      lengths: of rollouts.
      longest_problem: tokens of the longest problem of the run.
      turns: whether rollouts have several turns.
      evaluated: how many problems are in `validation`, and in `test` if there is one.
      instructions: tokens of the longest instructions of reflection.

    Raises:
      ValueError: reflection leaves no room for its instructions.
    """
    lanes, evolves = lanes_of(c), c.mode != "rl"
    limits = {"max_rows": c.sampling.max_rows or None}
    shared = limits | {
        "longest_problem": longest_problem,
        "truncation": Truncation(c.sampling.top_k, c.sampling.top_p, c.sampling.min_p),
        "turns": turns,
        "context_limit": c.sampling.context_limit or None,
    }
    group = c.num_prompts // lanes * c.group_size
    greedy = c.sampling.temperature == 0
    found = [Sampling("rollouts", "rollouts", lanes, c.batch_size, group, lengths, greedy=greedy, **shared)]
    if evolves and c.reflection.reflector == "local":
        found += _reflection(c, config, instructions, limits)
    prompts = {"validation": [], "test": [2 if evolves else 1]}
    if c.evaluation.every:
        prompts["validation"].append(1)
    if evolves and c.deployment.rule == "validation":
        prompts["validation"].append(c.deployment.candidates)
    for split, count in evaluated.items():
        for number in prompts[split]:
            name = split if number < 2 else f"{split} of {number} prompts"
            given = number, count, c.evaluation[f"{split}_samples"], lengths
            greedy = c.evaluation.temperature == 0
            found.append(Sampling(name, "evaluation", *given, greedy=greedy, **shared))
    return found


def _reflection(c: Any, config: DecoderConfig, instructions: int, limits: dict[str, Any]) -> list[Sampling]:
    """Summaries of all rollouts, and edits, from one critique for each problem at most; their conversations
    are as long as they may be.

    Shorter conversations come in shorter slots, and more of them where memory bounds their number.
    """
    r = c.reflection
    most = min(r.max_input_tokens, config.max_positions - r.max_new_tokens)
    if most <= instructions:
        raise ValueError(
            f"reflection.max_new_tokens={r.max_new_tokens}, .max_input_tokens={r.max_input_tokens}: of a "
            f"context of {config.max_positions} they leave {most} tokens for a conversation whose "
            f"instructions have {instructions}; lower the first, or raise the second"
        )
    lengths = Lengths(instructions, most - instructions, r.max_new_tokens)
    # Rounded up as the reflector does.
    longest = 1 << (lengths.problem - 1).bit_length()
    # While one prompt takes the places of all, every rollout is one of the best prompt.
    summaries = c.num_prompts * c.batch_size * c.group_size
    return [
        Sampling(
            name,
            "reflection",
            1,
            bucket(count, smallest=4),
            1,
            lengths,
            longest,
            greedy=r.temperature == 0,
            constrained=constrained,
            **limits,
        )
        for name, count, constrained in (
            ("summaries", summaries, False),
            ("edits", c.batch_size, r.constrained),
        )
    ]


def lanes_of(c: Any) -> int:
    """System prompts of an iteration; in modes without a choice one takes the places of all."""
    return c.num_prompts if c.mode in ("espl", "evolution") else 1
