"""Measures runs that have ended: KL divergences of their weights, and accuracy on further cells.

    python -m experiments.methods.ended kl WORKDIR
    python -m experiments.methods.ended test WORKDIR CELLS.json

Prints JSON. `compare_methods` starts it as a separate process, so that no model stays in memory between runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from espl_jax.console import command_line
from espl_jax.data import load
from espl_jax.models import lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params
from espl_jax.models.transformer import logits
from espl_jax.rollouts.collect import collect_rollouts
from espl_jax.rollouts.encode import encode_tree
from espl_jax.rollouts.keys import stream_key
from espl_jax.run.check_groups import trains
from espl_jax.run.parts import chat_format, sampling_of
from espl_jax.run.saved import SavedRun, read_run
from espl_jax.run.tasks import environment_of, load_splits
from espl_jax.run.weights import abstract_trainable, load_reference
from espl_jax.storage.workdir import read_checkpoint
from espl_jax.training.state import TrainState
from espl_jax.types import SystemPrompt

BATCH = 8


def kl_to_initial(workdir: Path, problems: int = 32) -> list[float]:
    """Returns KL(trained || initial) after each iteration, in nats per token, over the whole vocabulary.

    The mean is over the tokens of the replies to the first test problems under the root prompt, as the
    weights of the last iteration gave them in the run's test: all iterations are measured on one text.

    Args:
      workdir: of a run that trained weights, kept all checkpoints and has ended, with a test.
      problems: at most this many of the test.
    """
    run = read_run(workdir)
    config, tokenizer = run.config, run.model.tokenizer
    initial = _initial(run)
    tested = load_splits(config)["test"].problems[:problems]
    arguments = json.loads(config.model.chat_template_kwargs)
    (system,), (rests,) = encode_tree(tokenizer, [run.root], tested, environment_of(config), arguments)
    replies: dict[str, list[int]] = {}
    with (workdir / "evaluations.jsonl").open(encoding="utf-8") as file:
        for each in map(json.loads, file):
            if (each["split"], each["weights"], each["prompt"]) == ("test", "trained", run.root.id):
                replies.setdefault(each["problem"], each["tokens"])
    pairs = [([*system, *rest], replies[problem.id]) for rest, problem in zip(rests, tested, strict=True)]
    width = max(len(prompt) + len(reply) for prompt, reply in pairs)
    batches = []
    for start in range(0, len(pairs), BATCH):
        tokens, drawn = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), bool)
        for row, (prompt, reply) in enumerate(pairs[start : start + BATCH]):
            tokens[row, : len(prompt) + len(reply)] = prompt + reply
            drawn[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
        batches.append((tokens, drawn))
    count = sum(int(drawn.sum()) for _, drawn in batches)
    found = []
    for iteration in range(1, run.iteration + 1):
        params = _params_after(run, iteration, initial)
        summed = (_summed_kl(params, initial, run.model.config, *batch) for batch in batches)
        found.append(sum(map(float, summed)) / count)
    return found


def _initial(run: SavedRun) -> Params:
    """The weights that a run started from."""
    if run.adapters is None:
        return load_reference(run.config, None).params
    return lora.detach(run.model.params)[0]


def _params_after(run: SavedRun, iteration: int, initial: Params) -> Params:
    """The weights after an iteration, from its checkpoint."""
    wanted = TrainState(cast(jax.Array, None), abstract_trainable(run.config, run.model.config, None), None)
    saved = read_checkpoint(run.path, wanted, iteration)
    assert saved  # read_run has found one
    trainable = saved[1].trainable
    return trainable if run.adapters is None else lora.attach(initial, trainable)


@functools.partial(jax.jit, static_argnames="decoder")
def _summed_kl(
    params: Params, initial: Params, decoder: DecoderConfig, tokens: np.ndarray, drawn: np.ndarray
) -> jax.Array:
    """The sum of KL(params || initial) over the positions `drawn`, bool [R, T], of `tokens`, int32 [R, T]."""
    ours, theirs = (jax.nn.log_softmax(logits(each, decoder, tokens)) for each in (params, initial))
    return jnp.sum(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1), where=drawn)


def test_cells(workdir: Path, cells: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns success rates by problem for each cell.

    Args:
      workdir: of a run that has ended.
      cells: `weights`, which is `trained` or `initial`; `prompt`, which is `root`, `deployed`, or text and
        principles of another one; `data`, a data spec, or empty for the test problems of the run.
    """
    run = read_run(workdir)
    config = run.config
    found = []
    for cell in cells:
        prompt = cell["prompt"]
        if isinstance(prompt, str):
            prompt = run.prompt(prompt)
        else:
            prompt = SystemPrompt(prompt["text"], tuple(prompt["principles"]))
        data = load.load(cell["data"], "test") if cell["data"] else load_splits(config)["test"]
        model = run.model
        if cell["weights"] == "initial" and trains(config):
            model = dataclasses.replace(model, params=_initial(run))
        rollouts = collect_rollouts(
            model,
            [prompt],
            data.problems,
            environment_of(config),
            key=stream_key(config.seed, "test", config.num_iterations),
            group_size=config.evaluation.test_samples,
            sampling=dataclasses.replace(sampling_of(config), temperature=config.evaluation.temperature),
            chat=chat_format(config),
        )
        rates = rollouts.success[0].mean(axis=1).tolist()
        found.append({problem.id: rate for problem, rate in zip(rollouts.problems, rates, strict=True)})
    return found


def main() -> None:
    """Prints what the arguments ask for."""
    command_line.use_compilation_cache("~/.cache/espl_jax/xla")
    what, workdir, *cells = sys.argv[1:]
    if what == "kl":
        print(json.dumps(kl_to_initial(Path(workdir))))
    else:
        print(json.dumps(test_cells(Path(workdir), json.loads(Path(cells[0]).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
