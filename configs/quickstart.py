r"""Trains SmolLM2-135M on two-digit addition on a CPU; the model itself evolves its system prompt.

    make quickstart MODEL=smollm2

Takes about 8 minutes on two cores, installation included. Held-out accuracy goes from 0 to about 50%.
"""

from configs import common

MODELS = ("smollm2", "qwen2.5-coder-0.5b")


def get_config(model="smollm2"):
    """Returns a small configuration: rollouts fit in one decode chunk, microbatches hold four groups.

    Args:
      model: one of `MODELS`; `--config=configs/quickstart.py:MODEL` selects another than the first.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(MODELS)}")
    c = common.get_config()
    c.num_iterations = 4

    c.model.source = model
    c.model.remat = "none"
    c.lora.rank = 16

    c.data.train = "addition:digits=2,count=1000"
    c.data.validation = "addition:digits=2,count=50"
    c.data.test = "addition:digits=2,count=50"
    c.environment.name = "arithmetic"
    c.environment.answer_format = "last_number"
    c.population.text = "Reply with the sum."

    c.num_prompts, c.batch_size, c.group_size = 3, 8, 4
    c.sampling.temperature = 1.0
    c.sampling.max_new_tokens = 12
    c.evolution.max_edits, c.evolution.max_words, c.evolution.word_retries = 1, 12, 0
    c.evolution.max_principles = 2
    c.reflection.temperature = 0.7
    c.reflection.max_new_tokens = 64
    c.loss.microbatch_rows = 16
    c.optimizer.learning_rate = 1.5e-3
    c.evaluation.every = 0
    c.evaluation.temperature = 0.0
    c.evaluation.test_samples = 1
    return c
