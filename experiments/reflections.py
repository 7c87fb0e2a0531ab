r"""How well models reflect: lines against JSON, with and without reasoning, old templates against new ones.

    python -m experiments.reflections --source=smollm2 --out=reflections.json
    python -m experiments.reflections --source=qwen2.5-coder-0.5b --count=100 --out=reflections.json

Each cell asks for `--count` critiques of failed attempts at two-digit sums whose feedback is "There is no
answer in a box. The answer has to be written as \boxed{...}.", through the same code as a run. The attempts
are written by rule, so that all cells and models reflect on the same ones. Counted for each cell: replies
that ended by themselves, replies with an edit that can be read, edits that repeat the reflector's
instructions, edits accepted, and those of them that pass the feedback on (they say "box"). "Feedback alone"
are conversations that show neither the task nor the attempts, as in configs/quickstart.py. Results are added
to `--out`; cells that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from espl_jax.console.tables import table
from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.evolution.attempts import Attempt, problem_values
from espl_jax.evolution.guards import Guards
from espl_jax.evolution.principle_editor import PrincipleEditor
from espl_jax.evolution.reflection import Record
from espl_jax.evolution.settings import Evolution, Reflection
from espl_jax.evolution.templates import BUILT_IN, Templates
from espl_jax.pretrained.load import load_pretrained
from espl_jax.reflectors.local import LocalReflector
from espl_jax.sampling.settings import Sampling
from espl_jax.types import Problem, Rollouts, SystemPrompt

OLD_TEMPLATES = Templates(str(Path(__file__).parents[1] / "tests" / "evolution" / "first_templates"))
CELLS = {
    f"{form}, {reasoning}, {name}": {"format": form, "reasoning": reasoning, "templates": templates}
    for name, templates in (("new templates", BUILT_IN), ("old templates", OLD_TEMPLATES))
    for form in ("lines", "json")
    for reasoning in ("none", "brief")
    # The old templates ask for JSON, and have no place to reason.
    if name == "new templates" or (form, reasoning) == ("json", "none")
} | {
    f"{form}, none, new templates, feedback alone": {"format": form, "show": ("feedback",)}
    for form in ("lines", "json")
}
UNREAD = ("no_edit", "truncated", "broken_json", "unclear_end", "not_an_edit", "no_principle", "wrong_ids")
"""Drops of replies without an edit that can be read; a critique here proposes one."""

ATTEMPTS = 4


def failed_rollouts(count: int) -> Rollouts:
    """Attempts at sums that are right as often as not, and never boxed."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(10, 100, (count, 2)).tolist()
    problems = tuple(
        Problem(f"sum-{i}", f"What is {a} + {b}?", str(a + b)) for i, (a, b) in enumerate(numbers)
    )
    said = ("{}", "{a} + {b} equals {}.", "The sum of {a} and {b} is {}.", "{a} + {b} = {}")
    replies = tuple(
        tuple(text.format(a + b + int(rng.choice([0, 0, 10, -1])), a=a, b=b) for text in said)
        for a, b in numbers
    )
    environment = Arithmetic("boxed")
    grades = [
        environment.grade([problem] * ATTEMPTS, texts)
        for problem, texts in zip(problems, replies, strict=True)
    ]
    empty = np.zeros((1, count, ATTEMPTS, 0))
    return Rollouts(
        prompts=(SystemPrompt("Reply with the result.", id="p0"),),
        problems=problems,
        system_tokens=(),
        problem_tokens=(),
        tokens=empty,
        lengths=np.zeros((1, count, ATTEMPTS), int),
        drawn=empty,
        logprobs=empty,
        untruncated_logprobs=empty,
        cutoffs=empty,
        temperature=1.0,
        truncated=np.zeros((1, count, ATTEMPTS), bool),
        replies=(replies,),
        answers=(tuple((None,) * ATTEMPTS for _ in range(count)),),
        rewards=np.zeros((1, count, ATTEMPTS), np.float32),
        success=np.zeros((1, count, ATTEMPTS), bool),
        feedback=(tuple(tuple(grade.feedback for grade in each) for each in grades),),
    )


def measure(model: Any, rollouts: Rollouts, cell: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Asks one critique for each problem, and counts what came of it."""
    reflect = LocalReflector(
        model=model,
        key=jax.random.key(0),
        sampling=Sampling(max_new_tokens=96, temperature=temperature),
        reasoning_tokens=160,
    )
    settings = Reflection(**cell)
    evolution = Evolution(reflection=settings, guards=Guards(max_edits=1, word_retries=0))
    record = Record(reflect, evolution)
    editor = PrincipleEditor(rollouts.prompts[0], record, rollouts.problems)
    values = [
        problem_values(rollouts, [Attempt(0, b, j) for j in range(ATTEMPTS)], {}, settings)
        for b in range(len(rollouts.problems))
    ]
    start = time.monotonic()
    accepted = editor.criticize(values)
    seconds = time.monotonic() - start
    made = record.offspring(None)
    unread = sum(made.drops.get(reason, 0) for reason in UNREAD)
    count = len(rollouts.problems)
    return {
        "count": count,
        "ended": count - made.drops.get("cut_off", 0),
        "read": count - unread,
        "echoes": made.drops.get("copies_template", 0),
        "accepted": len(accepted),
        "passes_on": sum("box" in edit.principle.lower() for edit in accepted),
        "drops": made.drops,
        "seconds": round(seconds, 1),
        "replies": [each["reply"] for each in made.transcripts],
        "reasoning": [each.get("reasoning", "") for each in made.transcripts][:10],
    }


def main() -> None:
    """Measures the cells that the file does not hold, and prints all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="smollm2", help="the model, as model.source")
    parser.add_argument("--count", type=int, default=100, help="reflections of each cell")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the reflector")
    parser.add_argument("--cells", default="", help="only cells whose name holds this text")
    parser.add_argument("--out", default="reflections.json", help="file that results are added to")
    given = parser.parse_args()
    path = Path(given.out)
    results = json.loads(path.read_text()) if path.is_file() else {}
    model, rollouts = None, failed_rollouts(given.count)
    for name, cell in CELLS.items():
        key = f"{given.source} | {name}"
        if given.cells not in name or results.get(key, {}).get("count") == given.count:
            continue
        if model is None:
            model = load_pretrained(given.source, dtype="auto", param_dtype="auto", matmul_precision="auto")
        results[key] = measure(model, rollouts, cell, given.temperature)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    print(shown(results))


def shown(results: dict[str, Any]) -> str:
    """Returns the results as a table, model by model, in the order of `CELLS`."""
    columns = ("count", "ended", "read", "echoes", "accepted", "passes_on")
    rows = [["model", "cell", *(column.replace("_", " ") for column in columns)]]
    for source in dict.fromkeys(key.split(" | ")[0] for key in results):
        for cell in CELLS:
            if result := results.get(f"{source} | {cell}"):
                rows.append([source, cell, *(str(result[column]) for column in columns)])
    return table(rows)


if __name__ == "__main__":
    main()
