r"""Evaluates models under system prompts on problem sets.

    python -m espl_jax.evaluate --model=smollm2 --data=addition:digits=2,count=100 --environment=arithmetic \
        --answer_format=last_number --prompt="Reply with the sum." --prompt=runs/quickstart/population.json#p1

Every model is evaluated under every prompt on every problem set. Standard output gets the results, as a few
lines for one combination and as a table for several; standard error gets the progress.
"""

from __future__ import annotations

import sys

from absl import app, flags

from espl_jax.choices import DTYPES, ENVIRONMENTS, MATMUL_PRECISIONS, PARAM_DTYPES
from espl_jax.console import command_line
from espl_jax.evaluate.request import read_request
from espl_jax.text.tool_calls import FORMATS

flags.DEFINE_multi_string(
    "model", None, "smollm2, qwen2.5-coder-0.5b, a .gguf file, a folder, a name on the Hub, or a workdir."
)
flags.DEFINE_multi_string(
    "prompt",
    [""],
    "System prompt: text, a .txt file, or population.json#p7; empty: the template's default.",
)
flags.DEFINE_multi_string("data", None, "Problems: a .jsonl file, or addition:digits=2,count=100.")
flags.DEFINE_list("fields", [], "Field names in the files: text=task,answer=gold,id=key.")
flags.DEFINE_integer("limit", None, "Use only the first problems of each set.", lower_bound=1)
flags.DEFINE_string(
    "environment",
    "math",
    f"Environment that grades the problems: {', '.join(ENVIRONMENTS)}, or module:name.",
)
flags.DEFINE_string(
    "answer_format",
    "boxed",
    "boxed; math also: expression; arithmetic: last_number; reasoning_gym: tag, last_line.",
)
flags.DEFINE_string("instruction", None, "Text appended to each problem; default: ask for a box if needed.")
flags.DEFINE_string(
    "options",
    "{}",
    'JSON arguments of the environment; for search: {"retriever": "passages.jsonl", "max_turns": 6}.',
)
flags.DEFINE_string("reward", "", "module:function of (problem, reply, grade) that replaces the reward.")
flags.DEFINE_enum("tool_format", "auto", ["auto", *FORMATS], "Syntax of tool calls; auto: by chat template.")
flags.DEFINE_integer("samples", 4, "Rollouts per problem and prompt.", lower_bound=1)
flags.DEFINE_float("temperature", 0.7, "Sampling temperature; 0 is greedy.", lower_bound=0)
flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0 disables.", lower_bound=0)
flags.DEFINE_float(
    "top_p", 1.0, "Then from the smallest set with this much of their probability; 1 disables."
)
flags.DEFINE_float("min_p", 0.0, "Then from tokens with this ratio to the top probability; 0 disables.")
flags.DEFINE_integer("max_new_tokens", 1024, "New tokens per rollout.", lower_bound=1)
flags.DEFINE_multi_string("stop_string", [], "String that ends a rollout; may be repeated.")
flags.DEFINE_integer(
    "context_limit", 0, "Tokens per conversation; 0: the limit of each model.", lower_bound=0
)
flags.DEFINE_integer("seed", 0, "Sampling seed; the same seed gives the same rollouts.", lower_bound=0)
flags.DEFINE_integer("batch_size", 32, "Problems per batch; smaller batches take less memory.", lower_bound=1)
flags.DEFINE_integer(
    "max_rows", 0, "Maximum concurrent rollouts per prompt; 0: limited by memory.", lower_bound=0
)
flags.DEFINE_string(
    "chat_template_kwargs",
    "{}",
    'JSON arguments of the chat template: {"enable_thinking": false}; they override those of a run.',
)
flags.DEFINE_bool("show_thinking", None, "Grade thinking blocks too; default: as in the run, else no.")
flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of the KV cache and of matmul operands; default: auto.")
flags.DEFINE_enum("param_dtype", None, PARAM_DTYPES, "Storage dtype of weights; default: auto.")
flags.DEFINE_enum("matmul_precision", None, MATMUL_PRECISIONS, "Precision of matmul operands; default: auto.")
flags.DEFINE_list("mesh", [], "Mesh axes: data=1,fsdp=-1,tensor=2; -1: all remaining devices.")
flags.DEFINE_multi_string(
    "out", [], "New file: .json for settings and results, .jsonl for rollouts; may be repeated."
)
flags.DEFINE_string(
    "compilation_cache", "~/.cache/espl_jax/xla", "Persistent compilation cache; empty disables."
)


def main(argv: list[str]) -> None:
    """Checks the flags, runs the evaluation and prints the results."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; set flags with --name=value")
    try:
        request = read_request(flags.FLAGS)
    except ValueError as error:
        sys.exit(str(error))
    command_line.enough_threads()
    command_line.use_compilation_cache(flags.FLAGS.compilation_cache)
    with command_line.without_traceback():
        from espl_jax.evaluate.compare import compare  # late, since it imports jax

        compare(request)


def run() -> None:
    """The console script `espl-evaluate`."""
    app.run(main)


if __name__ == "__main__":
    run()
