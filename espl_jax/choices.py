"""The names of the choices in a configuration. Does not import jax, so that checking one is fast."""

MODES = ("espl", "rl", "evolution", "reflection")

DTYPES = ("float32", "bfloat16")
PARAM_DTYPES = (*DTYPES, "int8")
"""Storage dtypes of weights; int8 is for weights that are not trained."""

CACHE_DTYPES = ("same", "int8")
"""Dtypes of the cached keys and values of rows."""

MOST_DRAFT_TOKENS = 15
"""Most tokens of a draft. A decode step runs them together with the token before them."""

MATMUL_PRECISIONS = ("default", "highest", "bfloat16")
REMATS = ("none", "attention", "products", "full", "rounded", "offload")
SAMPLING_LAYOUTS = ("auto", "stacked", "unstacked")
LATENT_TARGETS = ("query_down", "query_up", "kv_down", "kv_up")
"""Projections of latent attention to and from the latents of queries, and of keys and values. `query` stands
for the first two, `key` and `value` each for the other two."""

LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down", "head", "router", *LATENT_TARGETS)
"""Linear weights that can have an adapter; `head` only if it is not tied to the embedding, `router` only in a
mixture of experts, and the last four only in latent attention."""

BASELINES = ("per_prompt", "marginalized")
NORMALIZATIONS = ("none", "std", "batch_std")
LOSSES = ("importance_sampling", "sequence_importance_sampling", "ppo", "cispo", "gspo")
SEQUENCE_LOSSES = ("sequence_importance_sampling", "gspo")
"""Losses with one term per rollout; the others have one term per token."""

CLIP_RANGES = {"ppo": (0.2, 0.2), "cispo": (1.0, 3.0), "gspo": (3e-4, 4e-4)}
"""Losses that clip -> their default `clip_low` and `clip_high`; the range of CISPO is [0, 4]."""

AGGREGATIONS = ("seq_mean_token_sum", "token_mean", "constant_length")
KL_ESTIMATORS = ("k1", "k2", "k3")
ROUTINGS = ("compare", "replay", "ignore")
"""What an update does with the sampler's choices of experts."""

OPTIMIZERS = ("adam", "adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
REFLECTORS = ("local", "openai", "replay")
REFLECTED_PROBLEMS = ("mixed_or_failed", "mixed", "failed", "all")
SHOWN = ("task", "summary", "trajectory", "verdict", "gold", "feedback")
"""What a reflector can be shown of a problem and the attempts at it."""

REASONINGS = ("none", "brief", "model")
EDIT_FORMATS = ("lines", "json")
OUTPUTS = ("edits", "rewrite")

ENVIRONMENTS = {
    "math": ("boxed", "expression"),
    "arithmetic": ("boxed", "last_number"),
    "reasoning_gym": ("boxed", "tag", "last_line"),
    "search": (),
}
"""Environment -> its answer formats, if there is a choice."""

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers; each needs the package of its name, which the extra of the same name installs."""
