"""Times the same update by transformers, PEFT and torch's autograd; see measure.py.

Every rollout is a row with its whole prompt, padded on the right, so that attention needs no mask but the
causal one. Logits are computed from the first completion of a microbatch on. Adam is torch's fused one.

With the setting `probe`, a list of microbatch sizes, nothing is updated: the result is the seconds per row of
forward and backward for each microbatch size. Sizes that would not fit into memory are skipped, and so are
all sizes after two consecutive ones that are slower than a smaller one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

import torch
from measure import LEARNING_RATE, peak_bytes, read_request, report_training
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

PROBED_ROWS = 12
PROBED_SECONDS = 20.0

request = read_request()
settings = request.settings
torch.set_num_threads(os.cpu_count())
autocast = settings["dtype"] == "autocast"
model = AutoModelForCausalLM.from_pretrained(
    request.model,
    dtype=torch.bfloat16 if settings["dtype"] == "bfloat16" else torch.float32,
    attn_implementation="sdpa",
)
if settings["checkpointing"]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
if settings["trained"] == "adapters":
    model = PeftModel.from_pretrained(model, request.adapter, is_trainable=True)
model.train()
trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

prompts = request.rows
completions = torch.tensor(request.completions).flatten(0, 2)
sampler_logprobs = torch.tensor(request.sampler_logprobs).flatten(0, 2)
advantages = torch.tensor(request.advantages).flatten()


def backward(first: int, size: int) -> float:
    """Adds the gradient of some rows to the weights', and returns their part of the loss."""
    rows = range(first, min(first + size, len(prompts)))
    ends = torch.tensor([len(prompts[row]) for row in rows])
    width = int(ends.max()) + request.max_new_tokens
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    columns = ends[:, None] + torch.arange(request.max_new_tokens)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(prompts[row])] = torch.tensor(prompts[row])
    part = slice(rows.start, rows.stop)
    tokens.scatter_(1, columns, completions[part])

    kept = width - int(ends.min()) + 1
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits
    own = columns - 1 - (width - kept)
    logits = torch.take_along_dim(logits, own[:, :, None], 1).float()
    logprobs = -cross_entropy(logits.flatten(0, 1), completions[part].flatten(), reduction="none")
    ratio = torch.exp(logprobs.view_as(own) - sampler_logprobs[part])
    loss = -(ratio * advantages[part, None]).sum() / len(prompts)
    loss.backward()
    return loss.item()


def step() -> tuple[float, float]:
    """One update."""
    optimizer.zero_grad()
    loss = sum(backward(first, settings["rows"]) for first in range(0, len(prompts), settings["rows"]))
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return loss, float(grad_norm)


def probe(sizes: list[int]) -> dict[int, float]:
    """Measures the seconds per row for each microbatch size."""
    empty, available = peak_bytes(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    backward(0, 1)
    found, worse = {}, 0
    for size in sizes:
        if (found and (peak_bytes() - empty) / max(found) * size > 0.8 * available) or worse == 2:
            break
        seconds, began = [], time.perf_counter()
        while len(seconds) * size < PROBED_ROWS and time.perf_counter() - began < PROBED_SECONDS:
            since = time.perf_counter()
            backward(len(seconds) * size, size)
            seconds.append((time.perf_counter() - since) / size)
        least = min(seconds)
        worse = worse + 1 if least > min(found.values(), default=least) else 0
        found[size] = least
    return found


if "probe" in settings:
    print(json.dumps(probe(settings["probe"])))
else:
    report_training(request, step, ("torch", "transformers", "peft"))
