"""The methods: modes of the configuration, and controls that use the prompt of another run."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

from espl_jax.choices import MODES
from espl_jax.types import SystemPrompt


@dataclasses.dataclass(frozen=True)
class Given:
    """What a control can make its root prompt from.

    Attributes:
      root: the root prompt of the task.
      feedback: what the task's grader says of a reply that breaks its convention.
      deployed: the prompt that the run in `Method.after` deployed; None without such a run.
      seed: of the run.
    """

    root: SystemPrompt
    feedback: str
    deployed: SystemPrompt | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
      mode: of the configuration; empty for a control that trains nothing.
      after: the method whose run with the same seed has to end first; empty for none.
      root: makes the root prompt; None for that of the task.
      more_rollouts: whether there are `num_prompts` times as many rollouts.
      weights: the method whose trained weights are tested under the deployed prompt of `after`; empty for a
        run.
    """

    mode: str = ""
    after: str = ""
    root: Callable[[Given], SystemPrompt] | None = None
    more_rollouts: bool = False
    weights: str = ""


def evolved(given: Given) -> SystemPrompt:
    """Returns the deployed prompt of the other run."""
    assert given.deployed
    return dataclasses.replace(given.root, text=given.deployed.text, principles=given.deployed.principles)


def fed_back(given: Given) -> SystemPrompt:
    """Returns the root prompt with the feedback as a principle."""
    return dataclasses.replace(given.root, principles=(*given.root.principles, given.feedback))


def at_random(given: Given) -> SystemPrompt:
    """Returns the root prompt with a principle of random words, which is as long as what evolution added."""
    assert given.deployed
    added = len(given.deployed.render().split()) - len(given.root.render().split())
    words = random.Random(given.seed).choices(WORDS, k=max(1, added))
    principle = " ".join(words).capitalize() + "."
    return dataclasses.replace(given.root, principles=(*given.root.principles, principle))


WORDS = "morning keep garden between slow paper often carry window under quiet number bring".split()  # noqa: SIM905
"""Words that make no sense together."""

METHODS = {
    **{mode: Method(mode) for mode in MODES},
    "rl_more": Method("rl", more_rollouts=True),
    "rl_from_feedback": Method("rl", root=fed_back),
    "rl_from_random": Method("rl", after="evolution", root=at_random),
    "rl_from_evolved": Method("rl", after="evolution", root=evolved),
    "rl_under_evolved": Method(after="evolution", weights="rl"),
}
"""Name -> method. The controls:

- `rl_more`: RL with M times the rollouts of the others, all under the root prompt.
- `rl_from_feedback`: RL from a root prompt that quotes the feedback.
- `rl_from_random`: RL from a root prompt with a principle of random words, as long as what evolution added.
- `rl_from_evolved`: RL from the prompt that the evolution run deployed.
- `rl_under_evolved`: the weights of the RL run under the prompt of the evolution run.
"""

GROUPS = {
    "controls": ("rl_more", "rl_from_feedback", "rl_from_random", "rl_from_evolved", "rl_under_evolved"),
    "ablations": (
        "espl",
        "espl:selection.strategy=uniform",
        "espl:selection.strategy=ucb",
        "espl:selection.strategy=lucb",
        "espl:selection.optimism=0",
        "espl:evolution.crossover_prob=0",
        "espl:loss.baseline=marginalized",
        "espl:num_prompts=1,group_size=12,deployment.rule=newest",
        "espl:num_prompts=5,batch_size=5",
        "espl:reflection.format=json",
        "espl:reflection.reasoning=brief,reflection.reasoning_tokens=160",
        "espl:reflection.problems=mixed",
        "espl:reflection.problems=failed",
    ),
    "proposers": ("espl", "espl:reflection.source=qwen2.5-coder-1.5b"),
}
"""Name -> variants that it stands for. Ablations keep the 96 rollouts of an iteration of
configs/quickstart.py, except with five prompts, where there are 100.
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with changed fields.

    Attributes:
      spec: as written: `espl`, or `espl:selection.strategy=ucb,num_prompts=1`.
    """

    spec: str

    @property
    def method(self) -> Method:
        """The method without its changes."""
        return METHODS[self.spec.partition(":")[0]]

    @property
    def changes(self) -> dict[str, str]:
        """Field -> value as text."""
        _, _, rest = self.spec.partition(":")
        return dict(pair.split("=", 1) for pair in rest.split(",") if pair)

    @property
    def file(self) -> str:
        """The spec as part of a file name."""
        return re.sub(r"[^\w.=-]+", "_", self.spec)


def variants(specs: str) -> list[Variant]:
    """Reads `rl,espl,controls`, or with changes `rl;espl:num_prompts=1,group_size=12`; each variant once.

    Raises:
      ValueError: for an unknown method, or a change that is not field=value.
    """
    found = {}
    for spec in re.split(";" if {":", ";"} & {*specs} else ",", specs):
        name, _, rest = spec.partition(":")
        if name not in METHODS and spec not in GROUPS:
            known = ", ".join([*METHODS, *GROUPS])
            raise ValueError(f"--methods={specs}: unknown method {name!r}; choose from {known}")
        if bad := [pair for pair in rest.split(",") if pair and "=" not in pair]:
            raise ValueError(f"--methods={specs}: {bad[0]!r} is not field=value; separate methods by ;")
        found |= {each: Variant(each) for each in GROUPS.get(spec, (spec,))}
    return [*found.values()]
