r"""Trains on GSM8K (7,473 grade-school problems), tests on the first 500 problems of its test split.

    python -m espl_jax.main --config=configs/gsm8k.py --workdir=runs/gsm8k

Any data set with a question and an answer works the same way. To use local files:

    --config.data.train=gsm8k_train.jsonl --config.data.test=gsm8k_test.jsonl:count=500

GSM8K is not used in the paper.
"""

from configs import hmmt


def get_config():
    """Returns the settings of configs/hmmt.py with easier problems and shorter answers."""
    c = hmmt.get_config()
    c.data.train = "hub:openai/gsm8k:config=main"
    c.data.test = "hub:openai/gsm8k:config=main,split=test,count=500"
    c.data.validation_count = 100
    c.sampling.max_new_tokens = 2048
    c.loss.microbatch_rows = 5
    c.evaluation.test_samples = 1
    return c
