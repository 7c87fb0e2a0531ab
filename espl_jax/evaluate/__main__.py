r"""Any models, under any prompts, on any problem sets.

    python -m espl_jax.evaluate --model=smollm2 --data=addition:digits=2,count=100 --environment=arithmetic \
        --answer_format=last_number --prompt="Reply with the sum." --prompt=runs/quickstart/population.json#p1

Every model is evaluated under every prompt on every problem set. One combination is shown as a few lines,
several as a table, on standard output; progress goes to standard error.
"""

from __future__ import annotations

import sys

from absl import app, flags

from espl_jax.choices import ENVIRONMENTS, MATMUL_PRECISIONS
from espl_jax.console import command_line
from espl_jax.evaluate.request import read_request
from espl_jax.text.tool_calls import FORMATS

DTYPES = ("float32", "bfloat16")

flags.DEFINE_multi_string(
    "model", None, "smollm2, qwen2.5-coder-0.5b, a .gguf file, a folder, a hub name, or a run's workdir."
)
flags.DEFINE_multi_string(
    "prompt",
    [""],
    "System prompt: its text, a .txt file or population.json#p7; empty: the template's default.",
)
flags.DEFINE_multi_string("data", None, "Problems: a .jsonl file, or addition:digits=2,count=100.")
flags.DEFINE_list("fields", [], "Names of fields in the files: text=task,answer=gold,id=key.")
flags.DEFINE_integer("limit", None, "Only so many problems of each set, the first ones.", lower_bound=1)
flags.DEFINE_string(
    "environment",
    "math",
    f"Words and grades problems: {', '.join(ENVIRONMENTS)}, or module:name of yours.",
)
flags.DEFINE_string("answer_format", "boxed", "boxed; math also: expression; arithmetic also: last_number.")
flags.DEFINE_string(
    "instruction", None, "Said after each problem; by default asks for a box if one is needed."
)
flags.DEFINE_string(
    "options",
    "{}",
    'JSON, further arguments of the environment: {"retriever": "passages.jsonl", "max_turns": 6} for search.',
)
flags.DEFINE_string("reward", "", "module:function of problem, reply and grade, in place of its own rewards.")
flags.DEFINE_enum("tool_format", "auto", ["auto", *FORMATS], "How models write calls; auto: by template.")
flags.DEFINE_integer("samples", 4, "Rollouts of each problem under each prompt.", lower_bound=1)
flags.DEFINE_float("temperature", 0.7, "Of sampling; 0 is greedy.", lower_bound=0)
flags.DEFINE_integer("top_k", 0, "Draw from so many most likely tokens only; 0 for all.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Then from the fewest that hold so much of the probability; 1 for all.")
flags.DEFINE_float("min_p", 0.0, "Then from those at least so likely, relative to the likeliest; 0 for all.")
flags.DEFINE_integer("max_new_tokens", 1024, "Of one rollout.", lower_bound=1)
flags.DEFINE_multi_string("stop_string", [], "A text that ends a rollout; may be given several times.")
flags.DEFINE_integer(
    "context_limit", 0, "Most tokens of a conversation; 0 for each model's own limit.", lower_bound=0
)
flags.DEFINE_integer(
    "seed", 0, "Of sampling; whatever is drawn again under a seed is the same.", lower_bound=0
)
flags.DEFINE_integer("batch_size", 32, "Problems side by side; fewer take less memory.", lower_bound=1)
flags.DEFINE_integer(
    "max_rows", 0, "Rollouts in flight at once for each prompt given; 0: as memory allows.", lower_bound=0
)
flags.DEFINE_string(
    "chat_template_kwargs",
    "{}",
    'JSON for the chat template: {"enable_thinking": false}; what a run sets stays unless it is set here.',
)
flags.DEFINE_bool("show_thinking", None, "Grade thinking blocks too; by default as the run did, else not.")
flags.DEFINE_enum("dtype", None, DTYPES, "KV cache and operands of products; auto if not given.")
flags.DEFINE_enum("param_dtype", None, DTYPES, "How weights are stored; auto if not given.")
flags.DEFINE_enum("matmul_precision", None, MATMUL_PRECISIONS, "Operands of products; auto if not given.")
flags.DEFINE_list("mesh", [], "Devices by axis: data=1,fsdp=-1,tensor=2. One may be -1; fsdp takes all.")
flags.DEFINE_multi_string(
    "out", [], "New file: .json holds settings and results, .jsonl every rollout; both may be given."
)
flags.DEFINE_string("compilation_cache", "~/.cache/espl_jax/xla", "Folder of compiled programs; empty: none.")


def main(argv: list[str]) -> None:
    """Checks the flags, samples, and shows what came out."""
    if len(argv) > 1:
        sys.exit(f"not understood: {' '.join(argv[1:])}; flags are set as --name=value")
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
