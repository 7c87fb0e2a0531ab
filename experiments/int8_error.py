"""Measures how much storing weights in another dtype changes a model, on its own greedy replies.

    python -m experiments.int8_error
    python -m experiments.int8_error --model=qwen2.5-coder-0.5b --param_dtypes=int8

The model with float32 weights answers 20 questions greedily. The columns, for each storage dtype:

- MB: bytes of the weights;
- max, mean: absolute difference of the logits at every token of the replies, given the same tokens before it;
- KL: KL(float32 || stored) of the next-token distributions at temperature 1, mean and largest, in nats;
- other argmax: share of these tokens at which the most likely token differs;
- other tokens: share of the tokens that differ when the stored model answers the questions itself, compared
  place by place. A reply that has left the other one counts as different from there on, mostly;
- same replies: replies that are equal throughout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from espl_jax.choices import PARAM_DTYPES
from espl_jax.console.tables import table
from espl_jax.models import transformer
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.pretrained.load import Pretrained, load_pretrained
from espl_jax.sampling.generate import generate

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "smollm2", "Model, as for load_pretrained.")
flags.DEFINE_multi_enum("param_dtypes", ["bfloat16", "int8"], PARAM_DTYPES, "Storage dtypes to compare.")
flags.DEFINE_integer("tokens", 64, "Tokens of a reply.", lower_bound=1)

HEADER = [
    *("weights", "MB", "max", "mean", "KL mean", "KL max"),
    *("other argmax", "other tokens", "same replies"),
]

QUESTIONS = (
    "What is the capital of France?",
    "What is 17 + 25?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "A train travels 60 km in 45 minutes. How fast is it in km/h?",
    "Write a Python function that reverses a string.",
    "What causes the seasons?",
    "Give me a recipe for pancakes.",
    "Summarize the plot of Cinderella in two sentences.",
    "What is the difference between a list and a tuple in Python?",
    "Name the planets in order from the sun.",
    "If I have 12 apples and give away 5, how many are left?",
    "What does photosynthesis produce?",
    "Write a polite email that declines an invitation.",
    "Is 91 a prime number? Explain.",
    "What is the opposite of 'generous'?",
    "How do I boil an egg?",
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one storage dtype changes, at the tokens of the replies.

    Attributes:
      largest: float32 [tokens], largest absolute difference of a token's logits.
      mean: float32 [tokens], their mean absolute difference.
      kl: float32 [tokens], KL(float32 || stored) in nats.
      other: bool [tokens], whether the most likely token differs.
    """

    largest: np.ndarray
    mean: np.ndarray
    kl: np.ndarray
    other: np.ndarray


def reply(model: Pretrained, prompts: list[list[int]]) -> np.ndarray:
    """Answers greedily. Returns int [prompts, tokens]; a reply goes on after the end of its turn."""
    drawn = generate(
        model.params,
        model.config,
        prompts,
        key=jax.random.key(0),
        group_size=1,
        max_new_tokens=FLAGS.tokens,
        temperature=0.0,
    )
    return drawn.tokens[:, 0]


@jax.jit
def _difference(exact: jax.Array, stored: jax.Array) -> tuple[jax.Array, ...]:
    """Compares logits [tokens, V]."""
    error = jnp.abs(exact - stored)
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(stored)
    kl = (jnp.exp(p) * (p - q)).sum(-1)
    return error.max(-1), error.mean(-1), kl, exact.argmax(-1) != stored.argmax(-1)


def compare(
    exact: Pretrained, stored: Pretrained, prompts: list[list[int]], replies: np.ndarray
) -> Difference:
    """Compares the logits of two models at every token of the replies."""
    found = []
    width = max(map(len, prompts)) + replies.shape[1] - 1
    logits: Any = jax.jit(transformer.logits, static_argnames="decoder")
    for prompt, tokens in zip(prompts, replies, strict=True):
        whole = np.zeros((1, width), np.int32)
        given = [*prompt, *tokens[:-1]]
        whole[0, : len(given)] = given
        cut = slice(len(prompt) - 1, len(given))
        found.append(_difference(*(logits(x.params, x.config, whole)[0, cut] for x in (exact, stored))))
    return Difference(*(np.concatenate(column) for column in zip(*found, strict=True)))


def line(
    name: str, model: Pretrained, difference: Difference, own: np.ndarray, replies: np.ndarray
) -> list[str]:
    """Returns the row of the table."""
    return [
        name,
        f"{bytes_per_device(model.params) / 1e6:.0f}",
        f"{difference.largest.max():.3f}",
        f"{difference.mean.mean():.4f}",
        f"{difference.kl.mean():.5f}",
        f"{difference.kl.max():.4f}",
        f"{difference.other.mean():.2%}",
        f"{(own != replies).mean():.1%}",
        f"{(own == replies).all(1).sum()} of {len(replies)}",
    ]


def main(_: list[str]) -> None:
    """Prints the table."""
    exact = load_pretrained(FLAGS.model, param_dtype="float32", remat="none")
    prompts = [
        exact.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    replies = reply(exact, prompts)
    rows = [
        ["weights", "MB", "max", "mean", "KL mean", "KL max", "other argmax", "other tokens", "same replies"]
    ]
    rows.append(["float32", f"{bytes_per_device(exact.params) / 1e6:.0f}", *"-------"])
    for dtype in FLAGS.param_dtypes:
        stored = load_pretrained(FLAGS.model, param_dtype=dtype, remat="none")
        difference = compare(exact, stored, prompts, replies)
        rows.append(line(dtype, stored, difference, reply(stored, prompts), replies))
    print(f"{FLAGS.model}, {len(prompts)} replies of {FLAGS.tokens} tokens\n\n{table(rows)}")


if __name__ == "__main__":
    app.run(main)
