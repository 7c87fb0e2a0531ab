r"""AIME 2022, 2023 and 2024 (90 problems) to BeyondAIME (100 problems), the paper's settings.

    python -m espl_jax.main --config=configs/aime.py --workdir=runs/aime

From files of your own, one problem a line with `problem` and `answer`:

    --config.data.train=aime_2022_to_2024.jsonl --config.data.test=beyond_aime.jsonl

The paper reports 36.5% before training, 39.1% with reflection alone, 38.8% with weights alone (GRPO), 40.0%
with prompts alone and 45.1% with both, for DeepSeek-V3.1.
"""

from configs import hmmt


def get_config():
    """The settings of configs/hmmt.py with other problems."""
    c = hmmt.get_config()
    c.data.train = "hub:AI-MO/aimo-validation-aime"
    c.data.test = "hub:ByteDance-Seed/BeyondAIME:split=test"
    return c
