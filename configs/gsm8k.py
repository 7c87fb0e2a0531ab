r"""GSM8K: 7,473 problems of school mathematics to the first 500 of its test set.

    python -m espl_jax.main --config=configs/gsm8k.py --workdir=runs/gsm8k

Any set with a question and an answer works in the same way. From files of your own:

    --config.data.train=gsm8k_train.jsonl --config.data.test=gsm8k_test.jsonl:count=500

The paper does not use it.
"""

from configs import hmmt


def get_config():
    """The settings of configs/hmmt.py with easier problems and shorter answers."""
    c = hmmt.get_config()
    c.data.train = "hub:openai/gsm8k:config=main"
    c.data.test = "hub:openai/gsm8k:config=main,split=test,count=500"
    c.data.validation_count = 100
    c.sampling.max_new_tokens = 2048
    c.loss.microbatch_rows = 5
    c.evaluation.test_samples = 1
    return c
