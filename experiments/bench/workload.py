"""The standard workload, and the model as a folder that everything measured reads.

    python workload.py FOLDER
    python workload.py FOLDER --training

writes FOLDER/model (SmolLM2-135M-Instruct in float32, safetensors) and FOLDER/workload.json: three system
prompts of about 200 tokens, four problems of about 40, and what our decoder answers greedily to the shortest
and the longest of them in float32, which every sampler has to reproduce before its figures count.

For training, the workload also has completions of random tokens with random advantages, whose logprobs are
those of our float32 decoder on plain sequences, and FOLDER/adapter has fresh adapters in PEFT's format. The
advantages do not sum to zero, so that the loss says something where all importance ratios are one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import checked

import espl_jax
from espl_jax.models import lora
from espl_jax.pretrained.load import Pretrained
from espl_jax.pretrained.peft import save_adapter

GROUP_SIZE = 5
MAX_NEW_TOKENS = 64
CHECKED_TOKENS = 10
LORA_RANK = 16

OPENINGS = (
    "You are a careful teacher of arithmetic who answers questions of pupils.",
    "You solve word problems and explain every step in plain words.",
    "You check the homework of others, and you work each problem out yourself.",
)
PRINCIPLES = (
    "Read the whole problem before you begin, and say in one sentence what is asked for.",
    "Write down every quantity with its unit, and keep the units until the end.",
    "Give a name to each unknown, and never use one name for two things.",
    "Do one operation at a time and put every result on a line of its own.",
    "When a number is a share of another, say which one is the whole.",
    "Estimate the size of the answer first, so that a slip of the pen is noticed.",
    "If something is bought and sold again, keep the money spent and the money earned apart.",
    "Never round a number before the last operation, and say so whenever you have rounded one.",
    "Go back to the question at the end, and check that this is what you have answered.",
    "Where a problem has several parts, answer them in the order in which they are put.",
    "Put the final number alone on the last line.",
)
PROBLEMS = (
    "A baker makes 36 rolls in the morning and 48 in the afternoon. She sells three quarters of all of them "
    "for 2 dollars each. How many dollars does she earn on that day?",
    "A train leaves at 9 in the morning and travels 240 kilometres in 3 hours. It then travels 150 "
    "kilometres at 75 kilometres an hour. At what time of the day does it arrive?",
    "Anna has twice as many marbles as Ben, and Ben has 5 more than Carl. Together the three of them have 55 "
    "marbles. How many marbles does each of the three children have?",
    "A tank holds 120 litres of water. One pipe fills it in 4 hours, and a leak empties it in 12 hours. How "
    "many hours does it take to fill the empty tank when both are open?",
)


def system_prompt(number: int) -> str:
    """One of the system prompts: an opening, and the principles in an order of its own."""
    turned = PRINCIPLES[3 * number :] + PRINCIPLES[: 3 * number]
    return " ".join([OPENINGS[number], *turned])


def training(model: Pretrained, tree: list[list[list[int]]]) -> dict[str, Any]:
    """Random rollouts of the prompts, as bench/measure.py describes them."""
    rng = np.random.default_rng(0)
    shape = (len(tree), len(tree[0]), GROUP_SIZE)
    completions = rng.integers(model.config.vocab_size, size=(*shape, MAX_NEW_TOKENS))
    width = max(len(prompt) for lane in tree for prompt in lane) + MAX_NEW_TOKENS
    score = jax.jit(espl_jax.token_logprobs, static_argnames="decoder")
    logprobs = np.zeros(completions.shape, np.float32)
    for m, b in np.ndindex(*shape[:2]):
        end = len(tree[m][b])
        tokens = np.zeros((GROUP_SIZE, width), np.int32)
        tokens[:, :end], tokens[:, end : end + MAX_NEW_TOKENS] = tree[m][b], completions[m, b]
        logprobs[m, b] = score(model.params, model.config, tokens)[:, end - 1 : end - 1 + MAX_NEW_TOKENS]
    return {
        "completions": completions.tolist(),
        "advantages": rng.normal(size=shape).tolist(),
        "sampler_logprobs": logprobs.tolist(),
    }


def main() -> None:
    """Writes the folder."""
    folder = Path(sys.argv[1]).resolve()
    model = espl_jax.load_pretrained("smollm2")
    espl_jax.save_pretrained(folder / "model", model.params, model.config, model.tokenizer)

    def tokens(number: int, problem: str) -> list[int]:
        messages = [
            {"role": "system", "content": system_prompt(number)},
            {"role": "user", "content": problem},
        ]
        return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    tree = [[tokens(number, problem) for problem in PROBLEMS] for number in range(len(OPENINGS))]
    greedy = espl_jax.generate(
        model.params,
        model.config,
        checked(tree),
        key=jax.random.key(0),
        group_size=1,
        max_new_tokens=CHECKED_TOKENS,
        temperature=0.0,
    )
    workload = {
        "prompts": tree,
        "group_size": GROUP_SIZE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "greedy": greedy.tokens[:, 0].tolist(),
    }
    if "--training" in sys.argv[2:]:
        workload |= training(model, tree)
        adapters = lora.init(jax.random.key(0), model.config, LORA_RANK)
        save_adapter(folder / "adapter", adapters, model.config, model.tokenizer, base=str(folder / "model"))
    (folder / "workload.json").write_text(json.dumps(workload), encoding="utf-8")


if __name__ == "__main__":
    main()
