"""Benchmarks BM25 retrieval: time to build the index, to open a cached one and to search, and memory.

    python -m experiments.bench_retrieval --passages=100000

The passages are generated, with about 60 words each. The k-th most frequent word has a probability
proportional to 1/k (Zipf's law), as in natural text. A query consists of random words of a random passage.
Building and opening are measured in separate processes, so that their memory is measured separately.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from espl_jax.console.tables import table
from espl_jax.environments.retrievers.index import import_bm25s
from espl_jax.environments.retrievers.load import Bm25

VOCABULARY = 200_000
QUERIES = 200


def write_passages(path: Path, count: int, seed: int = 0) -> None:
    """Writes generated passages of 30 to 90 words, as JSON lines with a title and a text."""
    rng = np.random.default_rng(seed)
    cumulated = np.cumsum(1.0 / np.arange(1, VOCABULARY + 1))
    with open(path, "w") as file:
        for number in range(count):
            drawn = np.searchsorted(cumulated, rng.random(rng.integers(30, 91)) * cumulated[-1])
            text = " ".join(map(word, drawn.tolist()))
            file.write(json.dumps({"title": f"page {number}", "text": text}) + "\n")


def word(number: int) -> str:
    """Returns the word for a number: at least five letters, alternating consonants and vowels."""
    letters = []
    while number or len(letters) < 5:
        alphabet = "aeiou" if len(letters) % 2 else "bdfgklmnprtvz"
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)


def measure(path: Path, words: tuple[int, ...]) -> dict[str, float | list[float]]:
    """Opens a file of passages and searches it. Returns the seconds of both and the peak memory in MiB."""
    import_bm25s()
    before = most_memory()
    begun = time.perf_counter()
    bm25 = Bm25.open(path)
    opened = time.perf_counter() - begun
    rng = np.random.default_rng(1)
    seconds: list[float] = []
    for length in words:
        times = []
        for number in rng.integers(len(bm25), size=QUERIES).tolist():
            query = " ".join(rng.choice(bm25.passage(number).text.split(), length))
            begun = time.perf_counter()
            bm25.search([query], 3)
            times.append(time.perf_counter() - begun)
        seconds.append(statistics.median(times))
    return {"open": opened, "search": seconds, "mib": most_memory() - before}


def most_memory() -> float:
    """Returns the peak memory of this process in MiB, from /proc; getrusage would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    words = (3, 10)
    if args.measure:
        print(json.dumps(measure(args.measure, words)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        write_passages(path, args.passages)
        command = [sys.executable, "-m", "experiments.bench_retrieval", f"--measure={path}"]
        environment = {**os.environ, "ESPL_JAX_CACHE": folder}
        built, reloaded = (
            json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            for _ in range(2)
        )
        index = sum(file.stat().st_size for file in Path(folder, "bm25").rglob("*") if file.is_file())
        size = path.stat().st_size
    rows = [
        ["", "BM25"],
        ["passages", f"{args.passages:,} ({size / 2**20:.0f} MiB)"],
        ["index on disk", f"{index / 2**20:.0f} MiB"],
        ["build and cache", f"{built['open']:.1f} s, {built['mib']:.0f} MiB of memory at most"],
        ["open the cached index", f"{reloaded['open'] * 1e3:.0f} ms"],
        *(
            [f"search of {length} words", f"{seconds * 1e3:.1f} ms"]
            for length, seconds in zip(words, reloaded["search"], strict=True)
        ),
        ["memory after the searches", f"{reloaded['mib']:.0f} MiB, mapped pages included"],
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
