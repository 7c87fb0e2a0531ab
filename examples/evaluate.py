"""Evaluates two system prompts on the same problems, from Python.

python examples/evaluate.py
"""

import jax

import espl_jax
from espl_jax.data.load import load
from espl_jax.environments.arithmetic import Arithmetic
from espl_jax.rollouts.evaluation import summarize
from espl_jax.sampling.settings import Sampling


def main(source: str = "smollm2", count: int = 20, samples: int = 2) -> list:
    """Prints and returns one evaluation per prompt.

    Args:
      source: the model, as for `load_pretrained`.
      count: number of problems.
      samples: rollouts per problem.
    """
    model = espl_jax.load_pretrained(source)
    problems = load(f"addition:digits=1,count={count}").problems
    prompts = [
        espl_jax.SystemPrompt(id="plain", text="Reply with the sum."),
        espl_jax.SystemPrompt(id="terse", text="Reply with the sum.", principles=("Say the number alone.",)),
    ]
    rollouts = espl_jax.collect_rollouts(
        model,
        prompts,
        problems,
        Arithmetic("last_number"),
        key=jax.random.key(0, impl="threefry2x32"),
        group_size=samples,
        sampling=Sampling(max_new_tokens=12, temperature=0.7),
    )
    evaluations = summarize(rollouts)
    for prompt, evaluation in zip(prompts, evaluations, strict=True):
        print(f"{prompt.id}: {evaluation}")
    return evaluations


if __name__ == "__main__":
    main()
