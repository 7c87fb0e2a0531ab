"""Shared by all measured processes: reads the request, times whole calls, prints one line of JSON.

It also runs in the environments of peers, so it uses only the standard library.
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

LEARNING_RATE = 4e-5
"""Of Adam, whose other settings are those of configs/common.py."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The request to a process: to sample, or to train on given rollouts.

    Attributes:
      model: folder with config.json and safetensors.
      prompts: [M][B] token lists; those of one m start with the same system prompt.
      group_size: continuations per prompt.
      max_new_tokens: tokens of every continuation, whatever they are.
      greedy: the first tokens of the most likely continuations of `checked`, in float32.
      repeats: calls after the first one.
      settings: the variant's own.
      completions: [M][B][N] token lists of `max_new_tokens`, the rollouts to train on.
      advantages: [M][B][N].
      sampler_logprobs: [M][B][N] lists, one number a token of `completions`.
      adapter: folder with fresh LoRA adapters of `model`, in PEFT's format.
    """

    model: str
    prompts: list[list[list[int]]]
    group_size: int
    max_new_tokens: int
    greedy: list[list[int]]
    repeats: int
    settings: dict[str, Any]
    completions: list[list[list[list[int]]]] = dataclasses.field(default_factory=list)
    advantages: list[list[list[float]]] = dataclasses.field(default_factory=list)
    sampler_logprobs: list[list[list[list[float]]]] = dataclasses.field(default_factory=list)
    adapter: str = ""

    @property
    def flat(self) -> list[list[int]]:
        """All prompts in one list."""
        return [prompt for lane in self.prompts for prompt in lane]

    @property
    def checked(self) -> list[list[int]]:
        """The shortest and the longest prompt, so that a batch of both needs padding."""
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
    """Reads the request from the command line: the workload's folder, and repeats and settings as JSON."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    workload = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return Request(model=str(folder / "model"), adapter=str(folder / "adapter"), **workload, **asked)


def measured(
    call: Callable[[int], Any], repeats: int, packages: tuple[str, ...]
) -> tuple[list[Any], dict[str, Any]]:
    """What `1 + repeats` calls return, each given its number, and what they took.

    Returns:
      (results, {`first_call` and `seconds` of the others, `peak_bytes` of the process so far, `versions` of
      `packages`}).
    """
    results, seconds = [], []
    for number in range(1 + repeats):
        began = time.perf_counter()
        results.append(call(number))
        seconds.append(time.perf_counter() - began)
    return results, {
        "first_call": seconds[0],
        "seconds": seconds[1:],
        "peak_bytes": peak_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def peak_bytes() -> int:
    """Returns the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    counts, result = measured(sample, request.repeats, packages)
    if wrong := set(counts) - {request.new_tokens}:
        raise RuntimeError(f"a call sampled {wrong.pop()} tokens, expected {request.new_tokens}")
    # After the measurement, because the check of greedy decoding compiles more programs.
    result["greedy"] = [[int(t) for t in row] for row in greedy(request.checked, len(request.greedy[0]))]
    print(json.dumps(result), flush=True)


def report_training(
    request: Request, step: Callable[[], tuple[float, float]], packages: tuple[str, ...]
) -> None:
    """Times `step`, one update of the weights, and prints the result as one line of JSON.

    Args:
      request: as read.
      step: returns (loss, norm of the gradient before clipping); those of the first update are reported,
        which are of the weights as they were read.
      packages: whose versions to name.
    """
    steps, result = measured(lambda _: step(), request.repeats, packages)
    loss, grad_norm = steps[0]
    print(json.dumps(result | {"loss": float(loss), "grad_norm": float(grad_norm)}), flush=True)
