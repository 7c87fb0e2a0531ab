r"""Measures how many tokens a decode step draws with drafts, and how much faster rollouts are.

    python -m experiments.bench_drafts --config=configs/quickstart.py
    python -m experiments.bench_drafts --config=configs/gsm8k.py --config.model.source=qwen2.5-coder-0.5b \
        --config.data.train=gsm8k_train.jsonl --config.data.test= --config.sampling.max_new_tokens=128 \
        --config.num_prompts=1 --config.batch_size=4 --config.group_size=8 --rows=4,16,60

Draws rollouts on the first problems of the training data in three epochs, with the same weights and other
random numbers, without drafts. Prints two tables:

1. Tokens per decode step, by the length of drafts and by where they are looked up. The steps are replayed
   with the recorded tokens in place of the model, so all lengths and sources are compared on the same
   rollouts: all rows of an epoch run side by side, and rows that have ended become texts for the others.
2. For each number of rows in flight in --rows, tokens per second of the third epoch: without drafts, and
   with drafts of up to --draft_tokens, whose lengths the sampler chooses. The two alternate, --repeats
   times each, after a call that compiles; medians.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from espl_jax.console.tables import table
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.keys import stream_key
from espl_jax.rollouts.past import Past
from espl_jax.run.check_config import check_config
from espl_jax.run.parts import Parts, assemble
from espl_jax.run.roots import first_population
from espl_jax.run.weights import settle_numerics
from espl_jax.sampling.draft_texts import DraftTexts
from espl_jax.sampling.drafts import propose
from espl_jax.types import Problem, Rollouts, SystemPrompt

EPOCHS = 3
LENGTHS = (2, 4, 8)

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=False)
_ROWS = flags.DEFINE_list("rows", [], "Numbers of rows to measure the speed with.")
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "sampling.draft_tokens of the measured speed.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Calls per number of rows.")


def collect(
    parts: Parts,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    group: int,
    epoch: int,
    **settings,
) -> Rollouts:
    """Draws the rollouts of an epoch. `settings` are `past`, `draft_tokens`, and `rows` in flight."""
    drafted, rows = settings.get("draft_tokens", 0), settings.get("rows")
    return collect_rollouts(
        parts.reference,
        prompts,
        problems,
        parts.environment,
        key=stream_key(0, "train", epoch),
        group_size=group,
        sampling=dataclasses.replace(parts.sampling, draft_tokens=drafted),
        chat=parts.chat,
        capacity=dataclasses.replace(parts.capacity, max_rows=rows) if rows else parts.capacity,
        past=settings.get("past"),
    )


def tokens_per_step(rollouts: Rollouts, drafted: int, past: Past | None, share: bool) -> float:
    """Returns the mean number of tokens that a row draws per decode step.

    Args:
      rollouts: rollouts whose tokens are drawn again.
      drafted: tokens of a draft.
      past: earlier rollouts; None to look up drafts in a row's own text only, or in those of its problem.
      share: whether rows that have ended become texts for the others.
    """
    places = list(np.ndindex(*rollouts.lengths.shape))
    rows = [rollouts.tokens[place][: rollouts.lengths[place]] for place in places]
    prompts = [[*rollouts.system_tokens[m], *rollouts.problem_tokens[m][b]] for m, b, _ in places]
    texts = DraftTexts(
        prompts,
        np.array([b for _, b, _ in places]),
        (past or Past()).on(rollouts.problems),
        own_columns=max(map(len, prompts)) + rollouts.tokens.shape[-1],
        new_tokens=rollouts.tokens.shape[-1],
        mesh=None,
    )
    position, steps, drawn = np.zeros(len(rows), int), 0, sum(map(len, rows))
    lookup = jax.jit(functools.partial(propose, count=drafted))
    numbers = np.arange(len(rows))
    while (running := position < [len(row) for row in rows]).any():
        given = texts.of_rows(numbers)
        drafts = np.asarray(lookup(given.shared[given.problem], given.own, given.length))
        for i in np.flatnonzero(running):
            row, start = rows[i], int(position[i])
            left = row[start : start + drafted]
            agree = drafts[i][: len(left)] == left
            count = min(int(np.cumprod(agree).sum()) + 1, len(row) - start)
            texts.write(i, start, row[start : start + count])
            position[i] += count
            steps += 1
            if share and position[i] == len(row):
                texts.share(i, row)
    return drawn / steps


def speeds(
    parts: Parts,
    prompts: Sequence[SystemPrompt],
    problems: Sequence[Problem],
    group: int,
    past: Past,
    rows: int,
) -> list[str]:
    """Returns a line of the second table: tokens per second without and with drafts, and their ratio."""
    group = max(group, -(-rows // len(problems)))
    taken: dict[int, list[float]] = {0: [], _DRAFT_TOKENS.value: []}
    for repeat in range(_REPEATS.value + 1):
        for drafted, measured in taken.items():
            began = time.perf_counter()
            rollouts = collect(
                parts,
                prompts,
                problems,
                group,
                EPOCHS - 1,
                draft_tokens=drafted,
                past=past.on(problems),
                rows=rows,
            )
            seconds = time.perf_counter() - began
            if repeat:
                measured.append(rollouts.drawn.sum() / seconds)
    without, with_drafts = (statistics.median(each) for each in taken.values())
    pairs = [b / a for a, b in zip(*taken.values(), strict=True)]
    ratio = f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
    return [f"{rows} of {len(problems) * group}", f"{without:.1f}", f"{with_drafts:.1f}", ratio]


def main(_: Sequence[str]) -> None:
    """Draws the rollouts and prints the tables."""
    config = _CONFIG.value
    check_config(config)
    config = settle_numerics(config)
    parts = assemble(config)
    prompts = first_population(config).members[:1] * config.num_prompts
    problems = parts.splits["train"].problems[: config.batch_size]
    past, drawn = [Past()], []
    for epoch in range(EPOCHS):
        drawn.append(collect(parts, prompts, problems, config.group_size, epoch))
        past.append(past[-1].with_rollouts(drawn[-1]))
    sources = {"its own text": (False, False), "and rows that have ended": (False, True)}
    lines = [["looked up in", "epoch", *(f"{length} drafted" for length in LENGTHS)]]
    for epoch in (0, EPOCHS - 1):
        more = {"and earlier rollouts": (True, True)} if epoch else {}
        for name, (earlier, share) in (sources | more).items():
            found = [
                tokens_per_step(drawn[epoch], length, past[epoch] if earlier else None, share)
                for length in LENGTHS
            ]
            lines.append([name, str(epoch + 1), *(f"{each:.2f}" for each in found)])
    mean = np.mean([each.lengths.mean() for each in drawn])
    print(
        f"{config.model.source}, {config.data.train}, temperature {config.sampling.temperature}: {EPOCHS} "
        f"epochs of {drawn[0].lengths.size} rollouts of {mean:.0f} tokens on {len(problems)} problems"
    )
    print(table(lines), flush=True)
    if _ROWS.value:
        measured = []
        for rows in _ROWS.value:
            measured.append(speeds(parts, prompts[:1], problems, config.group_size, past[-2], int(rows)))
            print(" ".join(measured[-1]), flush=True)
        print(table([["rows in flight", "tokens/s", "with drafts", "ratio"], *measured]))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
