"""Settings of evolution: how prompts change, and what the reflector is shown and asked."""

from __future__ import annotations

import dataclasses

from espl_jax.evolution.guards import Guards
from espl_jax.evolution.templates import BUILT_IN, Templates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflection:
    """What the reflector is shown, and how it is asked.

    Attributes:
      problems: which problems are reflected on: `mixed` (largest reward > smallest), `failed` (no success),
        `mixed_or_failed` (failed ones where none is mixed) or `all`.
      max_problems: most problems of one mutation, drawn at random among those; 0 for all.
      max_attempts: most attempts shown of one problem, drawn at random with as many right as wrong ones if
        possible; 0 for all.
      show: of `choices.SHOWN`, what the reflector sees of problems and attempts. With `summary`, attempts of
        `verbatim_chars` characters and more are summarized first, and shorter ones are shown as they are;
        with `trajectory` all are; with neither, only what was said about them.
      verbatim_chars: characters; 0 summarizes every attempt.
      rejected_edits: most recently rejected edits that are shown.
      stages: 3 (summaries, one critique for each problem, one revision) or 1 (one call for all problems).
      output: `edits`, or `rewrite` (a new text of the whole prompt; one stage).
      format: `lines` or `json`, how edits are written.
      reasoning: what comes before edits: `none`, `brief` (free text in a turn of its own) or `model` (the
        model's own thinking).
      opening: whether the beginning of a free reply is written for the reflector, if it is not constrained.
      constrained: whether edits are kept to their grammar, where the reflector can.
      templates: what is said to the reflector.
    """

    problems: str = "mixed_or_failed"
    max_problems: int = 0
    max_attempts: int = 0
    show: tuple[str, ...] = ("task", "summary", "verdict", "gold", "feedback")
    verbatim_chars: int = 2000
    rejected_edits: int = 8
    stages: int = 3
    output: str = "edits"
    format: str = "lines"
    reasoning: str = "none"
    opening: bool = False
    constrained: bool = True
    templates: Templates = BUILT_IN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """How prompts change.

    Attributes:
      form: `principles` edits the list, `prose` the text.
      guards: what is accepted of the edits proposed.
      reflection: what the reflector is shown and asked.
      crossover_prob: chance of a crossover where at least two distinct prompts ran.
      crossover_sigma, mutation_sigma: what the children's uncertainty grows by.
      tie_margin: mean rewards this close tie, and win no problem.
    """

    form: str = "principles"
    guards: Guards = Guards()
    reflection: Reflection = Reflection()
    crossover_prob: float = 0.2
    crossover_sigma: float = 1.0
    mutation_sigma: float = 1.0
    tie_margin: float = 0.01
