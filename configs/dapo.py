r"""100 problems of DAPO-Math-17k to AIME 2025, the paper's settings.

    python -m espl_jax.main --config=configs/dapo.py --workdir=runs/dapo

Every statement of DAPO-Math-17k is there about a hundred times, and a few with several answers: the first of
each is kept, these are shuffled, and 100 taken. From files of your own, one problem a line with `problem` and
`answer` (or dapo-math-17k.parquet as it is, with the options below):

    --config.data.train=dapo_100.jsonl --config.data.test=aime_2025.jsonl

The paper reports 48.6% before training, 54.6% with reflection alone, 56.3% with weights alone (GRPO), 57.3%
with prompts alone and 60.6% with both, for DeepSeek-V3.1.
"""

from configs import hmmt


def get_config():
    """The settings of configs/hmmt.py with other problems and fewer iterations."""
    c = hmmt.get_config()
    c.num_iterations = 16
    c.data.train = (
        "hub:BytedTsinghua-SIA/DAPO-Math-17k:count=100,shuffle=42,repeats=first,"
        "text=prompt.0.content,answer=reward_model.ground_truth"
    )
    c.data.test = "hub:yentinglin/aime_2025"
    return c
