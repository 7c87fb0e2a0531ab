"""The sampling workloads of a run at their largest, from which `plan.programs` lists what is compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.run.check_groups import records_routing
from espl_jax.run.config import Config
from espl_jax.sampling.buckets import bucket
from espl_jax.sampling.layout import for_sampling
from espl_jax.sampling.programs import Shapes
from espl_jax.sampling.settings import Sampling
from espl_jax.sampling.sizes import CHUNK, Sizes, choose_sizes
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Maximum tokens at each level: system prompt, problem, and new tokens."""

    system: int
    problem: int
    new: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """One sampling workload, at its largest.

    Attributes:
      name: what is sampled.
      phase: `rollouts`, `reflection` or `evaluation`.
      lanes, problems, group: M system prompts, B problems, N samples of each.
      lengths: maximum tokens at each level.
      longest_problem: problem length, in tokens, that sizes are chosen for.
      greedy: whether decoding is greedy.
      truncation: truncated sampling.
      turns: whether tokens may be appended to rows.
      constrained: whether decoding is constrained by a grammar.
      reasoning: most tokens sampled freely before the grammar applies.
      context_limit, max_rows: as in `choose_sizes`.
      record_routing: whether the choices of experts are recorded.
      draft_tokens: most tokens of a draft.
      tokens_per_step: tokens that a row draws in a decode step with drafts.
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
    reasoning: int = 0
    context_limit: int | None = None
    max_rows: int | None = None
    record_routing: bool = False
    draft_tokens: int = 0
    tokens_per_step: float = 1.0

    @property
    def rows(self) -> int:
        """M * B * N."""
        return self.lanes * self.problems * self.group

    def sizes(
        self, decoder: DecoderConfig, held: int, mesh: Mesh | None, memory: int | None = None
    ) -> tuple[Sizes, ...]:
        """Returns the sizes that `sample_tree` would reserve. Arguments and errors as in `choose_sizes`."""
        return choose_sizes(
            decoder,
            lanes=self.lanes,
            rows=self.rows,
            longest_problem=self.longest_problem,
            max_new_tokens=self.lengths.new,
            context_limit=self.context_limit,
            chunk=1 if self.constrained and not self.reasoning else CHUNK,
            turns=self.turns,
            coarse=self.phase == "reflection",
            draft_tokens=self.draft_tokens,
            max_rows=self.max_rows,
            held=held,
            memory=memory,
            mesh=mesh,
        )

    def shapes(
        self,
        decoder: DecoderConfig,
        params: Params,
        stages: Sequence[Sizes],
        mesh: Mesh | None,
        stop_ids: int = 1,
    ) -> Shapes:
        """Returns what the programs of the workload depend on.

        Args:
          decoder: the model's configuration.
          params: abstract params.
          stages: the sizes that it reserves.
          mesh: the device mesh.
          stop_ids: number of tokens that end a turn.
        """
        params, decoder = for_sampling(params, decoder, mesh)
        return Shapes(
            params=params,
            decoder=decoder,
            stages=stages,
            lanes=self.lanes,
            problems=self.problems,
            rows=self.rows,
            system=bucket(self.lengths.system),
            problem=self.lengths.problem,
            sampling=Sampling(
                max_new_tokens=self.lengths.new,
                temperature=0.0 if self.greedy else 1.0,
                truncation=self.truncation,
                stop_ids=tuple(range(stop_ids)),
                record_routing=self.record_routing,
                draft_tokens=self.draft_tokens,
            ),
            turns=self.turns,
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
    tokens_per_step: float = 1.0,
) -> list[Workload]:
    """Returns the sampling workloads of a run, training rollouts first.

    Args:
      config: the run's configuration.
      decoder: the model's configuration.
      lengths: maximum lengths of rollouts.
      longest_problem: tokens of the longest problem of the run.
      turns: whether rollouts have several turns.
      evaluated: number of problems in `validation`, and in `test` if there is one.
      instructions: tokens of the longest instructions of reflection.
      tokens_per_step: tokens that a row draws in a decode step with drafts.

    Raises:
      ValueError: if the limits of reflection leave no room for its instructions.
    """
    lanes, evolves = lanes_of(config), config.mode != "rl"
    limits = {
        "max_rows": config.sampling.max_rows or None,
        "draft_tokens": config.sampling.draft_tokens,
        "tokens_per_step": tokens_per_step,
    }
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
    given = lanes, config.batch_size, group, lengths
    recorded = records_routing(config) and decoder.experts is not None
    found = [workload("rollouts", "rollouts", *given, greedy=greedy, record_routing=recorded)]
    # Another model than the policy has programs of its own.
    if evolves and config.reflection.reflector == "local" and not config.reflection.source:
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
    """Returns the workloads of reflection: summaries of all rollouts, and edits from at most one critique per
    problem, with conversations of maximum length.

    Shorter conversations use shorter slots, and more of them if memory is the limit.
    """
    r = config.reflection
    reasoning = 0 if r.reasoning == "none" else r.reasoning_tokens
    most = min(r.max_input_tokens, decoder.max_positions - r.max_new_tokens - reasoning)
    if most <= instructions:
        raise ValueError(
            f"reflection.max_new_tokens={r.max_new_tokens}, .reasoning_tokens={reasoning}, "
            f".max_input_tokens={r.max_input_tokens}: in a context of {decoder.max_positions} tokens this "
            f"leaves {most} for a conversation whose instructions alone have {instructions}; lower "
            "max_new_tokens or reasoning_tokens, or raise max_input_tokens"
        )
    lengths = Lengths(instructions, most - instructions, r.max_new_tokens)
    # Rounded up like in the reflector.
    longest = 1 << (lengths.problem - 1).bit_length()
    # With a single prompt per iteration, every rollout belongs to the best prompt.
    summaries = config.num_prompts * config.batch_size * config.group_size
    return [
        Workload(
            name,
            "reflection",
            1,
            bucket(count, smallest=4),
            1,
            dataclasses.replace(lengths, new=r.max_new_tokens + tokens),
            longest,
            greedy=r.temperature == 0,
            constrained=constrained,
            turns=tokens > 0,
            reasoning=tokens,
            **limits,
        )
        for name, count, constrained, tokens in (
            ("summaries", summaries, False, 0),
            ("edits", config.batch_size, r.constrained, reasoning),
        )
        if name == "edits" or "summary" in r.show
    ]


def lanes_of(config: Config) -> int:
    """Returns the number of system prompts per iteration; modes without selection run a single one."""
    return config.num_prompts if config.mode in ("espl", "evolution") else 1
