"""What every sampler's process does: read its request, time whole calls, print one line of JSON.

It runs in the environments of peers and needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Request:
    """What a sampler's process is asked for.

    Attributes:
      model: folder with config.json and safetensors.
      prompts: [M][B] token lists; those of one m begin with the same system prompt.
      group_size: continuations of every prompt.
      max_new_tokens: tokens of every continuation, whatever they are.
      greedy: the first tokens of the most likely continuations of `checked`, in float32.
      repeats: calls after the first one.
      settings: the variant's own.
    """

    model: str
    prompts: list[list[list[int]]]
    group_size: int
    max_new_tokens: int
    greedy: list[list[int]]
    repeats: int
    settings: dict[str, Any]

    @property
    def flat(self) -> list[list[int]]:
        """The prompts, one after another."""
        return [prompt for lane in self.prompts for prompt in lane]

    @property
    def checked(self) -> list[list[int]]:
        """The shortest and the longest prompt: side by side, one of them is padded."""
        return checked(self.prompts)

    @property
    def rows(self) -> list[list[int]]:
        """Every prompt `group_size` times."""
        return [prompt for prompt in self.flat for _ in range(self.group_size)]

    @property
    def new_tokens(self) -> int:
        """New tokens of one call."""
        return len(self.rows) * self.max_new_tokens


def checked(prompts: list[list[list[int]]]) -> list[list[int]]:
    """The shortest and the longest of [M][B] token lists."""
    flat = sorted((prompt for lane in prompts for prompt in lane), key=len)
    return [flat[0], flat[-1]]


def read_request() -> Request:
    """The request out of the command line: the workload's folder, and repeats and settings as JSON."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    workload = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return Request(model=str(folder / "model"), **workload, **asked)


def report(
    request: Request,
    sample: Callable[[int], int],
    greedy: Callable[[list[list[int]], int], list[list[int]]],
    packages: tuple[str, ...],
) -> None:
    """Times `sample`, checks `greedy`, and prints the result as one line of JSON.

    Args:
      request: as read.
      sample: one whole call, prefill included: seed -> number of new tokens.
      greedy: (prompts, count) -> the `count` most likely next tokens of each, sampled in one call.
      packages: whose versions to name.
    """
    seconds = []
    for seed in range(1 + request.repeats):
        began = time.perf_counter()
        new_tokens = sample(seed)
        seconds.append(time.perf_counter() - began)
        if new_tokens != request.new_tokens:
            raise RuntimeError(f"a call drew {new_tokens} tokens and not {request.new_tokens}")
    # Before the check of greedy decoding, which compiles programs of its own.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "first_call": seconds[0],
        "seconds": seconds[1:],
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "greedy": [[int(t) for t in row] for row in greedy(request.checked, len(request.greedy[0]))],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(result), flush=True)
