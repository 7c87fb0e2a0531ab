"""Every sampling that a run does, at its largest, for `plan.programs` to list what is compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.run.config import Config
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
class Workload:
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
        self, decoder: DecoderConfig, held: int, mesh: Mesh | None, memory: int | None = None
    ) -> tuple[Sizes, ...]:
        """What it reserves, as `sample_tree` does. Arguments and errors are those of `choose_sizes`."""
        return choose_sizes(
            decoder,
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


def workloads(
    config: Config,
    decoder: DecoderConfig,
    lengths: Lengths,
    *,
    longest_problem: int,
    turns: bool,
    evaluated: Mapping[str, int],
    instructions: int,
) -> list[Workload]:
    """The samplings of a run, the rollouts of an iteration first.

    Args:
      config: the run's configuration.
      decoder: the model's shape.
      lengths: of rollouts.
      longest_problem: tokens of the longest problem of the run.
      turns: whether rollouts have several turns.
      evaluated: how many problems are in `validation`, and in `test` if there is one.
      instructions: tokens of the longest instructions of reflection.

    Raises:
      ValueError: reflection leaves no room for its instructions.
    """
    lanes, evolves = lanes_of(config), config.mode != "rl"
    limits = {"max_rows": config.sampling.max_rows or None}
    workload = functools.partial(
        Workload,
        longest_problem=longest_problem,
        truncation=Truncation(config.sampling.top_k, config.sampling.top_p, config.sampling.min_p),
        turns=turns,
        context_limit=config.sampling.context_limit or None,
        **limits,
    )
    group = config.num_prompts // lanes * config.group_size
    greedy = config.sampling.temperature == 0
    found = [workload("rollouts", "rollouts", lanes, config.batch_size, group, lengths, greedy=greedy)]
    if evolves and config.reflection.reflector == "local":
        found += _reflection(config, decoder, instructions, limits)
    prompts = {"validation": [], "test": [2 if evolves else 1]}
    if config.evaluation.every:
        prompts["validation"].append(1)
    if evolves and config.deployment.rule == "validation":
        prompts["validation"].append(config.deployment.candidates)
    for split, count in evaluated.items():
        for number in prompts[split]:
            name = split if number < 2 else f"{split} of {number} prompts"
            given = number, count, config.evaluation[f"{split}_samples"], lengths
            greedy = config.evaluation.temperature == 0
            found.append(workload(name, "evaluation", *given, greedy=greedy))
    return found


def _reflection(
    config: Config, decoder: DecoderConfig, instructions: int, limits: dict[str, Any]
) -> list[Workload]:
    """Summaries of all rollouts, and edits, from one critique for each problem at most; their conversations
    are as long as they may be.

    Shorter conversations come in shorter slots, and more of them where memory bounds their number.
    """
    r = config.reflection
    most = min(r.max_input_tokens, decoder.max_positions - r.max_new_tokens)
    if most <= instructions:
        raise ValueError(
            f"reflection.max_new_tokens={r.max_new_tokens}, .max_input_tokens={r.max_input_tokens}: of a "
            f"context of {decoder.max_positions} they leave {most} tokens for a conversation whose "
            f"instructions have {instructions}; lower the first, or raise the second"
        )
    lengths = Lengths(instructions, most - instructions, r.max_new_tokens)
    # Rounded up as the reflector does.
    longest = 1 << (lengths.problem - 1).bit_length()
    # While one prompt takes the places of all, every rollout is one of the best prompt.
    summaries = config.num_prompts * config.batch_size * config.group_size
    return [
        Workload(
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
            ("edits", config.batch_size, r.constrained),
        )
    ]


def lanes_of(config: Config) -> int:
    """System prompts of an iteration; in modes without a choice one takes the places of all."""
    return config.num_prompts if config.mode in ("espl", "evolution") else 1
