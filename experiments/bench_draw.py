"""Measures the time to sample a token, relative to the matmul with the output head.

    python -m experiments.bench_draw

60 rows by default, with SmolLM2-135M's vocabulary and width. Probabilities follow a power law of the token's
rank: `sure` has 0.7 nats of entropy, `open` 3.2, and `flat` nearly the maximum. The more tokens truncation
keeps, the more of the vocabulary has to be searched. The variants are interleaved; medians are shown.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from espl_jax.console.tables import table
from espl_jax.sampling import draw
from espl_jax.sampling.truncation import UNTRUNCATED, Truncation

DRAWN_FROM = {"sure": 3.0, "open": 1.5, "flat": 0.01}
"""Exponents a: the k-th most likely token has a probability proportional to k ** -a."""

WAYS = {
    "untruncated": UNTRUNCATED,
    "top-k 50": Truncation(top_k=50),
    "top-p 0.95": Truncation(top_p=0.95),
    "min-p 0.05": Truncation(min_p=0.05),
}


def head(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes logits, [R, D] x [V, D] -> float32 [R, V], as the decoder does with bfloat16 weights."""
    return jnp.einsum("rd,vd->rv", hidden.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def milliseconds(calls: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each call, after compilation."""
    for call in calls.values():
        jax.block_until_ready(call())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    ranks = 1 + jax.vmap(lambda key: jax.random.permutation(key, args.vocab))(
        jax.random.split(jax.random.key(0), args.rows)
    )
    uniform = jax.random.uniform(jax.random.key(1), (args.rows,))
    hidden = jax.random.normal(jax.random.key(2), (args.rows, args.width))
    weight = jax.random.normal(jax.random.key(3), (args.vocab, args.width), jnp.bfloat16)
    compiled_head = jax.jit(head)
    compiled_draw = jax.jit(draw.draw, static_argnames="truncation")
    calls: dict[str, Callable[[], jax.Array]] = {"head": lambda: compiled_head(hidden, weight)}
    for shape, exponent in DRAWN_FROM.items():
        logits = -exponent * jnp.log(ranks)
        for name, truncation in WAYS.items():
            calls[f"{name}, {shape}"] = functools.partial(
                compiled_draw, logits, uniform, 1.0, truncation=truncation
            )
    taken = milliseconds(calls, args.repeats)
    rows = [["", "ms", "of the head's"]]
    rows += [[name, f"{ms:.1f}", f"{ms / taken['head']:.2f}"] for name, ms in taken.items()]
    print(f"{args.rows} rows, vocabulary {args.vocab:,}, width {args.width:,}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
