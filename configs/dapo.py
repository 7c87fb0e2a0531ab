r"""Trains on 100 problems of DAPO-Math-17k, tests on AIME 2025; the paper's settings.

    python -m espl_jax.main --config=configs/dapo.py --workdir=runs/dapo

DAPO-Math-17k contains each statement about 100 times, a few of them with different answers. The first copy
of each is kept, the rest dropped; then the problems are shuffled and 100 are taken. To use local files, with
one JSON object per line (fields `problem` and `answer`), or dapo-math-17k.parquet with the options below:

    --config.data.train=dapo_100.jsonl --config.data.test=aime_2025.jsonl

For DeepSeek-V3.1, the paper reports 48.6% before training, 54.6% with reflection only, 56.3% when training
only the weights (GRPO), 57.3% when evolving only the prompts, and 60.6% with both.
"""

from configs import hmmt


def get_config(model="qwen3-8b"):
    """Returns the settings of configs/hmmt.py with different problems and fewer iterations.

    Args:
      model: one of `hmmt.MODELS`.
    """
    c = hmmt.get_config(model)
    c.num_iterations = 16
    c.data.train = (
        "hub:BytedTsinghua-SIA/DAPO-Math-17k:count=100,shuffle=42,repeats=first,"
        "text=prompt.0.content,answer=reward_model.ground_truth"
    )
    c.data.test = "hub:yentinglin/aime_2025"
    return c
