"""Compares new tokens per second of our sampler, transformers' `generate` and google-tunix's sampler.

    python -m experiments.bench_rollout --out=results.json
    python -m experiments.bench_rollout --peers=ours,transformers --repeats=5 --torch="torch==2.13.0"

The standard workload has 3 system prompts of about 200 tokens, 4 problems of about 40 and groups of 5, which
is 60 rows, and exactly 64 new tokens per row at temperature 1, with SmolLM2-135M-Instruct. Timings cover
whole calls, prefill included; the first call, which compiles, is reported separately. All samplers load the
same folder, written by `save_pretrained`, and must start a greedy continuation with the same tokens as our
float32 decoder.

Variants run one after another, each in a separate process. Each peer has a virtual environment in the folder
`.bench`, created once (about 3 GB, ignored by git). Ours runs in the current environment. All run on CPU
unless JAX_PLATFORMS says otherwise. `--torch` selects another build of torch, with pip options if needed.
Takes about half an hour on two idle cores, most of it for tunix.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

from experiments.bench.variants import (
    Variant,
    arguments,
    call,
    install,
    write_results,
    write_workload,
)

OURS = dict.fromkeys(("dtype", "param_dtype", "matmul_precision"), "auto")

VARIANTS = (
    Variant("ours", "layers unstacked", OURS | {"sampling_layout": "unstacked"}),
    Variant("ours", "layers stacked", OURS | {"sampling_layout": "stacked"}),
    Variant("transformers", "float32", {"dtype": "float32"}),
    Variant("transformers", "bfloat16", {"dtype": "bfloat16"}),
    Variant("tunix", "float32", {"dtype": "float32"}),
    Variant("tunix", "bfloat16", {"dtype": "bfloat16"}),
)
PEERS = tuple(dict.fromkeys(variant.peer for variant in VARIANTS))


def measure(variant: Variant, repeats: int, timeout: float, wanted: list[list[int]]) -> dict[str, Any]:
    """Runs a variant in its process and returns its report; see bench/measure.py.

    Args:
      variant: what to run.
      repeats: calls after the first one.
      timeout: most seconds that it may take.
      wanted: the first tokens of the greedy continuations.

    Raises:
      RuntimeError: if the process fails, or its greedy continuations start with other tokens.
    """
    result = call(f"run_{variant.peer}.py", variant.peer, repeats, variant.settings, timeout)
    if result["greedy"] != wanted:
        raise RuntimeError(f"its greedy continuation is {result['greedy']}, expected {wanted}")
    return result


def rates(row: dict[str, Any], new_tokens: int) -> tuple[float, float]:
    """Returns the best and the median new tokens per second of a measured row."""
    return new_tokens / min(row["seconds"]), new_tokens / statistics.median(row["seconds"])


def table(rows: list[dict[str, Any]], new_tokens: int) -> str:
    """Formats the results as a Markdown table.

    Args:
      rows: each with `peer`, `variant`, and either the report of bench/measure.py or an `error`, whose last
        line is shown.
      new_tokens: new tokens of one call.
    """
    best = {}
    for row in rows:
        if "error" not in row:
            best[row["peer"]] = max(best.get(row["peer"], 0.0), rates(row, new_tokens)[0])

    def share(rate: float, peer: str) -> str:
        return f"{rate / best[peer]:.2f}" if peer in best else "-"

    lines = [
        "| sampler | variant | new tokens/s, best | median | to our best | to transformers' best "
        "| first call, s | peak memory, GiB | versions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            cells = ["failed: " + row["error"].splitlines()[-1].replace("|", "/"), *"------"]
        else:
            fastest, median = rates(row, new_tokens)
            cells = [
                f"{fastest:.1f}",
                f"{median:.1f}",
                share(fastest, "ours"),
                share(fastest, "transformers"),
                f"{row['first_call']:.1f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
            ]
        lines.append(f"| {' | '.join([row['peer'], row['variant'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything; exits with 1 if any variant failed."""
    args = arguments(__doc__, PEERS, repeats=3, timeout=1800)
    workload = write_workload()
    prompts = sum(map(len, workload["prompts"]))
    new_tokens = prompts * workload["group_size"] * workload["max_new_tokens"]
    rows = []
    for variant in VARIANTS:
        if variant.peer not in args.peers:
            continue
        row = {"peer": variant.peer, "variant": variant.name}
        try:
            install(variant.peer, args.torch)
            row |= measure(variant, args.repeats, args.timeout, workload["greedy"])
            said = ", ".join(f"{second:.1f}" for second in row["seconds"])
            print(f"{variant.peer}, {variant.name}: {row['first_call']:.1f} s, then {said} s", flush=True)
        except RuntimeError as error:
            row["error"] = str(error)
            print(f"{variant.peer}, {variant.name} failed:\n{error}", flush=True)
        rows.append(row)
        write_results(args.out, rows, new_tokens=new_tokens)
    print(f"\n{new_tokens} new tokens a call, {os.cpu_count()} cores\n\n{table(rows, new_tokens)}")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
