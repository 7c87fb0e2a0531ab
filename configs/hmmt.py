r"""HMMT of February 2023, 2024 and 2025 to November 2025, the paper's settings on a TPU VM.

    python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/hmmt

The problem texts are licensed CC BY-NC-SA and not shipped: they come from the hub, 30 of each contest, or
from files of your own, one problem a line with `problem` and `answer`:

    --config.data.train='feb_2023.jsonl + feb_2024.jsonl + feb_2025.jsonl' --config.data.test=nov_2025.jsonl

The paper reports 39.3% before training, 47.0% with reflection alone, 50.0% with weights alone (GRPO), 48.6%
with prompts alone and 52.7% with both, for DeepSeek-V3.1.
"""

from configs import common


def get_config():
    """The paper's settings for its math tasks, said again where configs/common.py has them already."""
    c = common.get_config()
    c.num_iterations = 30
    c.model.source = "Qwen/Qwen3-8B"
    c.data.train = " + ".join(f"hub:MathArena/hmmt_feb_{year}" for year in (2023, 2024, 2025))
    c.data.test = "hub:MathArena/hmmt_nov_2025"
    c.environment.name = "math"
    c.num_prompts, c.batch_size, c.group_size = 3, 10, 5
    c.selection.window = 10
    c.sampling.temperature = 0.7
    c.sampling.top_p = 0.95
    c.sampling.max_new_tokens = 15_000
    c.lora.rank = 32
    c.optimizer.learning_rate = 4e-5
    c.loss.microbatch_rows = 1
    c.evaluation.test_samples = 10
    return c
