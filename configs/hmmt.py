r"""Trains on HMMT February 2023 to 2025, tests on HMMT November 2025; the paper's settings for a TPU VM.

    python -m espl_jax.main --config=configs/hmmt.py --workdir=runs/hmmt
    python -m espl_jax.main --config=configs/hmmt.py:qwen3-30b-a3b --workdir=runs/hmmt   # fits v5p:2x2x1
    python -m espl_jax.main --config=configs/hmmt.py:gpt-oss-120b --workdir=runs/hmmt    # fits v5p:2x2x2
    python -m espl_jax.main --config=configs/hmmt.py:deepseek-v3.1 --workdir=runs/hmmt   # see SETTINGS

The problem texts are licensed CC BY-NC-SA and are not shipped with this package. They are downloaded from
the Hub (30 problems per contest). To use local files, with one JSON object per line (fields `problem` and
`answer`):

    --config.data.train='feb_2023.jsonl + feb_2024.jsonl + feb_2025.jsonl' --config.data.test=nov_2025.jsonl

For DeepSeek-V3.1, the paper reports 39.3% before training, 47.0% with reflection only, 50.0% when training
only the weights (GRPO), 48.6% when evolving only the prompts, and 52.7% with both.
"""

from configs import common

MODELS = {
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "deepseek-v3.1": "deepseek-ai/DeepSeek-V3.1",
}
"""Presets; the paper trains DeepSeek-V3.1 on its math tasks, and gpt-oss-120b on search."""

SETTINGS = {
    "qwen3-30b-a3b": {"mesh.expert": 4},
    "gpt-oss-120b": {"mesh.expert": 8},
    "deepseek-v3.1": {"mesh.expert": 128},
}
"""Meshes of the presets, for v5p:2x2x1, v5p:2x2x2 and v5p:4x4x8. The last one has not been compiled to its
end; an update on v5p:4x4x4 with `mesh.expert=64` does not fit. Ask `espl_jax.plan` first."""


def get_config(model="qwen3-8b"):
    """Returns the paper's settings for its math tasks, repeating those that are defaults already.

    Args:
      model: one of `MODELS`.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(MODELS)}")
    c = common.get_config()
    c.num_iterations = 30
    c.model.source = MODELS[model]
    c.update_from_flattened_dict(SETTINGS.get(model, {}))
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
