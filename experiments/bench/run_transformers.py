"""Times transformers' `generate` with torch; see measure.py.

Prompts are padded on the left, and `generate` itself repeats each of them for its group.
"""

from __future__ import annotations

import os

import torch
from measure import read_request, report
from transformers import AutoModelForCausalLM, GenerationConfig

PAD = 0

request = read_request()
torch.set_num_threads(os.cpu_count())
model = AutoModelForCausalLM.from_pretrained(
    request.model, dtype=getattr(torch, request.settings["dtype"]), attn_implementation="sdpa"
).eval()
# What `generate` is not told, it takes from here: the tokens that end a sequence among them.
model.generation_config = GenerationConfig(pad_token_id=PAD)


@torch.inference_mode()
def generate(prompts: list[list[int]], **options) -> torch.Tensor:
    """The new tokens of every row."""
    width = max(map(len, prompts))
    rows = [([PAD] * (width - len(prompt)) + prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    out = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), **options)
    return out[:, width:]


def sample(seed: int) -> int:
    """One call of the workload."""
    torch.manual_seed(seed)
    new = generate(
        request.flat,
        max_new_tokens=request.max_new_tokens,
        num_return_sequences=request.group_size,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return new.numel()


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    """The most likely continuation of each prompt."""
    return generate(prompts, max_new_tokens=count, do_sample=False).tolist()


report(request, sample, greedy, ("torch", "transformers"))
