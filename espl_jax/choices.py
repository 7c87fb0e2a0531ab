"""The names among which a configuration chooses. Free of jax, so that checking one does not import it."""

MODES = ("espl", "rl", "evolution", "reflection")

MATMUL_PRECISIONS = ("default", "highest", "bfloat16")
REMATS = ("none", "attention", "products", "full", "rounded", "offload")
SAMPLING_LAYOUTS = ("auto", "stacked", "unstacked")
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down", "head")
"""Linear weights that can carry an adapter; `head` only where it is not tied to the embedding."""

BASELINES = ("per_prompt", "marginalized")
NORMALIZATIONS = ("none", "std", "batch_std")
LOSSES = ("importance_sampling", "sequence_importance_sampling", "ppo", "cispo", "gspo")
SEQUENCE_LOSSES = ("sequence_importance_sampling", "gspo")
"""Losses with one term for each rollout; the others have one for each token."""

CLIP_RANGES = {"ppo": (0.2, 0.2), "cispo": (1.0, 3.0), "gspo": (3e-4, 4e-4)}
"""The losses that clip, each with its default `clip_low` and `clip_high`; the range of CISPO is 0 to 4."""

AGGREGATIONS = ("seq_mean_token_sum", "token_mean", "constant_length")
KL_ESTIMATORS = ("k1", "k2", "k3")
OPTIMIZERS = ("adam", "adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
REFLECTORS = ("local", "openai", "replay")
REFLECTED_PROBLEMS = ("mixed_or_failed", "mixed", "failed", "all")
SHOWN = ("summary", "trajectory", "verdict", "gold", "feedback")
"""What a reflector can be shown of an attempt."""

REASONINGS = ("none", "brief", "model")
EDIT_FORMATS = ("lines", "json")
OUTPUTS = ("edits", "rewrite")

ENVIRONMENTS = {"math": ("boxed", "expression"), "arithmetic": ("boxed", "last_number"), "search": ()}
"""The environments, and the answer formats of each where there is a choice."""
