"""Measures decode throughput as a function of context length; prints a table and draws a plot.

    python -m experiments.bench_context --plot=context.png
    python -m experiments.bench_context --contexts=256,1024 --shared=0.5 --rows=16 --layers=8

All rows continue one prompt and end at the given context length. A fraction of the prompt is a system prompt
shared by all rows; each row has its own copy of the rest. The model has SmolLM2-135M's shapes and random
weights. Times are taken between the ends of chunks and exclude prefill and compilation. The last line of the
table runs the shortest context in slots with room for the longest, to show that a step costs what is filled
and not what is reserved. Takes about a quarter of an hour on two idle cores. The plot needs matplotlib:
`pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from espl_jax.models.config import DecoderConfig, Rope
from espl_jax.models.params import Params, init
from espl_jax.sampling.draw import row_keys
from espl_jax.sampling.generate import sample_tree
from espl_jax.sampling.settings import Capacity, Sampling
from espl_jax.sampling.sizes import CHUNK

SMOLLM2 = DecoderConfig(
    vocab_size=49_152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope=Rope(theta=100_000.0),
    tied_head=True,
    max_positions=8192,
    param_dtype="bfloat16",
    matmul_precision="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting and its measurement.

    Attributes:
      shared: fraction of the prompt that is in the system prompt.
      context: tokens of the prompt and the row at the end of the measurement.
      reserved: tokens that a row has room for.
      step: seconds per decode step of all rows, best of all repeats.
      rate: new tokens per second, over all rows.
    """

    shared: float
    context: int
    reserved: int
    step: float
    rate: float


def measure(
    params: Params,
    config: DecoderConfig,
    *,
    shared: float,
    context: int,
    reserved: int,
    rows: int,
    new_tokens: int,
    repeats: int,
) -> Point:
    """Decodes one untimed chunk and then `new_tokens` timed tokens, `1 + repeats` times."""
    total = CHUNK + new_tokens
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=context - total).tolist()
    cut = min(round(shared * len(prompt)), len(prompt) - 1)
    best = float("inf")
    for repeat in range(1 + repeats):
        ended: dict[int, float] = {}

        def find_end(turn: Sequence[int], _: int, ended: dict[int, float] = ended) -> int | None:
            ended.setdefault(len(turn), time.perf_counter())
            return len(turn) if len(turn) >= total else None

        sample_tree(
            params,
            config,
            [prompt[:cut]],
            [[prompt[cut:]]],
            row_keys(jax.random.key(repeat), *np.ogrid[:1, :1, :rows]),
            Sampling(max_new_tokens=reserved - len(prompt)),
            Capacity(max_rows=rows),
            find_end=find_end,
        )
        if repeat:  # the first one compiles
            best = min(best, ended[total] - ended[CHUNK])
    return Point(shared, context, reserved, best / new_tokens, rows * new_tokens / best)


def table(points: Sequence[Point]) -> str:
    """Formats the points as a Markdown table."""
    lines = ["| in the system prompt | context | room for | ms per step | new tokens/s |", "| --- " * 5 + "|"]
    lines += [
        f"| {p.shared:.0%} | {p.context:,} | {p.reserved:,} | {1000 * p.step:.0f} | {p.rate:.1f} |"
        for p in points
    ]
    return "\n".join(lines)


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Plots new tokens per second over context: a line per fraction, a cross where slots have spare room."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for shared in dict.fromkeys(p.shared for p in points):
        line = [p for p in points if p.shared == shared and p.context == p.reserved]
        axes.plot([p.context for p in line], [p.rate for p in line], marker="o", label=f"{shared:.0%} shared")
    for p in points:
        if p.context != p.reserved:
            label = f"{p.shared:.0%} shared, room for {p.reserved:,}"
            axes.plot(p.context, p.rate, "kx", markersize=9, label=label)
    contexts = sorted({p.context for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set(xlabel="context, tokens", ylabel="new tokens per second", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="256,512,1024,2048,4096", help="tokens, comma-separated")
    parser.add_argument(
        "--shared", default="0,0.75", help="fractions of the prompt in the system prompt, comma-separated"
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64, help="timed tokens, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SMOLLM2.num_layers)
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    args.contexts = sorted(int(context) for context in args.contexts.split(","))
    args.shared = [float(share) for share in args.shared.split(",")]
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error(f"--plot={args.plot}: matplotlib is missing; pip install -e '.[bench]'")
    if args.new_tokens < 1 or args.new_tokens % CHUNK:
        parser.error(f"--new_tokens={args.new_tokens}: give a multiple of {CHUNK}")
    shortest = CHUNK + args.new_tokens + 2
    if args.contexts[0] < shortest or args.contexts[-1] > SMOLLM2.max_positions:
        parser.error(f"--contexts={args.contexts}: give {shortest} to {SMOLLM2.max_positions} tokens")
    return args


def main() -> None:
    """Measures, prints the table, and writes the plot."""
    args = arguments()
    config = SMOLLM2.replace(num_layers=args.layers)
    params = init(jax.random.key(0), config)
    settings = [(shared, context, context) for shared in args.shared for context in args.contexts]
    settings.append((args.shared[0], args.contexts[0], args.contexts[-1]))
    points = []
    for shared, context, reserved in settings:
        point = measure(
            params,
            config,
            shared=shared,
            context=context,
            reserved=reserved,
            rows=args.rows,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
        )
        points.append(point)
        print(f"{shared:.0%} shared, {context:,} of {reserved:,}: {point.rate:.1f} tokens/s", flush=True)
    title = f"Decoding {args.rows} rows, SmolLM2-135M's shapes, {args.layers} layers"
    print(f"\n{title}\n\n{table(points)}")
    if args.plot:
        plot(points, title, args.plot)


if __name__ == "__main__":
    main()
