r"""Trains on AIME 2022 to 2024 (90 problems), tests on BeyondAIME (100 problems); the paper's settings.

    python -m espl_jax.main --config=configs/aime.py --workdir=runs/aime

To use local files, with one JSON object per line (fields `problem` and `answer`):

    --config.data.train=aime_2022_to_2024.jsonl --config.data.test=beyond_aime.jsonl

For DeepSeek-V3.1, the paper reports 36.5% before training, 39.1% with reflection only, 38.8% when training
only the weights (GRPO), 40.0% when evolving only the prompts, and 45.1% with both.
"""

from configs import hmmt


def get_config(model="qwen3-8b"):
    """Returns the settings of configs/hmmt.py with different problems.

    Args:
      model: one of `hmmt.MODELS`.
    """
    c = hmmt.get_config(model)
    c.data.train = "hub:AI-MO/aimo-validation-aime"
    c.data.test = "hub:ByteDance-Seed/BeyondAIME:split=test"
    return c
