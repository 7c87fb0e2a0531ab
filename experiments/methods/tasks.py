r"""The tasks: a configuration, changes to it, and the feedback of its grader.

On a CPU, with Qwen2.5-Coder-0.5B-Instruct:

- `convention`: two-digit sums that have to be boxed, which the root prompt does not say. RL cannot start.
- `sometimes`: the same under a root prompt that asks for a box in words that the model rarely follows.
- `unit`: two-digit sums, whose result has to be followed by the word "points" and needs no box: a second
  convention for weights that have learned the first. Without the unit a right number earns half.
- `prices`: facts that the feedback tells, and products of one- and two-digit numbers; hard ones have larger
  numbers.
- `gsm8k`: grade-school problems, under a root prompt that says what to do. Prompts may matter little.
- `showcase`: a box and a unit, trained on two-digit sums and tested on three-digit ones.

The first three are also tested on three-digit sums; `cpu` names `convention`, `sometimes` and `prices`.

On TPUs, the paper's settings: `hmmt`, `aime`, `dapo` and `search`. By the bounds of docs/tpus.md, 30
iterations of one of the first three (Qwen3-8B, LoRA, all rollouts at full length) take at least 5 hours on
v5p:2x2x1, and 15 on v5e:2x2 with `-- --config.mesh.tensor=4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from espl_jax.environments import boxed
from experiments.methods import prices

QWEN = "configs/quickstart.py:qwen2.5-coder-0.5b"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      config: file with the configuration, as `--config` takes it.
      fields: changes to it.
      hard: a data spec with harder problems, which are tested besides; empty for none.
      feedback: what the grader says of a reply that breaks the convention; the control `rl_from_feedback`
        puts it into the root prompt.
    """

    config: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hard: str = ""
    feedback: str = boxed.NO_BOX


TWO_DIGITS = "addition:digits=2,count=100"
THREE_DIGITS = "addition:digits=3,count=100"

TASKS = {
    "convention": Task(QWEN, {"data.test": TWO_DIGITS}, hard=THREE_DIGITS),
    "sometimes": Task(
        QWEN,
        {
            "data.test": TWO_DIGITS,
            "population.text": "Reply with the result. Put it in a LaTeX box.",
        },
        hard=THREE_DIGITS,
    ),
    "unit": Task(
        QWEN,
        {
            "data.test": TWO_DIGITS,
            "environment.answer_format": "last_number",
            "environment.options": '{"unit": "points"}',
        },
        hard=THREE_DIGITS,
        feedback='The unit is missing. The number has to be followed by the word "points".',
    ),
    "prices": Task(
        QWEN,
        {
            "data.train": "experiments/methods/prices-train.jsonl",
            "data.validation": "",
            "data.test": "experiments/methods/prices-test.jsonl",
            "environment.name": "experiments.methods.prices:Prices",
            "sampling.max_new_tokens": 48,  # in fewer, replies are cut off, and reflection is about that
            "num_iterations": 6,
        },
        hard="experiments/methods/prices-hard.jsonl",
        feedback=prices.ALL_SAID,
    ),
    "gsm8k": Task(
        QWEN,
        {
            "data.train": "hub:openai/gsm8k:config=main",
            "data.validation": "",
            "data.test": "hub:openai/gsm8k:config=main,split=test,count=100",
            "environment.name": "math",
            "environment.instruction": boxed.INSTRUCTION,
            "population.text": "Solve the problem step by step.",
            "sampling.max_new_tokens": 200,
            "batch_size": 4,
            "reflection.show": ("task", "trajectory", "verdict", "gold", "feedback"),
            "loss.microbatch_rows": 8,
        },
    ),
    "showcase": Task("configs/showcase.py"),
    "hmmt": Task("configs/hmmt.py"),
    "aime": Task("configs/aime.py"),
    "dapo": Task("configs/dapo.py"),
    "search": Task("configs/search.py", feedback="There is no line that begins with Answer:."),
}

PRESETS = {"cpu": ("convention", "sometimes", "prices")}
"""Names for several tasks."""


def named(names: str) -> dict[str, Task]:
    """Returns the tasks of a list such as `convention,sometimes` or `cpu`, by name.

    Raises:
      ValueError: for an unknown name.
    """
    found = {}
    for name in names.split(","):
        if name not in TASKS and name not in PRESETS:
            known = ", ".join([*TASKS, *PRESETS])
            raise ValueError(f"--task={names}: unknown task {name!r}; choose from {known}")
        found |= {task: TASKS[task] for task in PRESETS.get(name, (name,))}
    return found
