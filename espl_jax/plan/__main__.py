"""Says whether a run fits on a TPU slice, and how long an iteration takes at least, before one is paid for.

    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5e:4x4
    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5p:2x2x2 --config.mesh.tensor=4

Every program of the run is compiled for that topology, by the compiler that TPUs have, on this machine, up
to where memory is assigned, or with `--codegen` to the end. Of rollouts these are prefill, the decode chunk
of every bucket at its full width, and what admits, moves and extends rows; of reflection on device and of
evaluation the same at the largest bucket, with constrained decoding; of updates the policy-gradient step, and
scoring where there are several. For each it prints what a device needs of HBM, what it computes and moves,
and the larger of the two bounds that follow. As in the run, sampling reserves as many slots as the chip has
room for. No weight is allocated, and of a model on the hub config.json alone is fetched.

An iteration is reckoned at its longest: every rollout draws all tokens that it may, every group has a
gradient, and prompts are as long as the flags say. The time of reflection and evaluation is not in it. A
bound is what the chip could do at best, and leaves out what devices send each other.

The exit code is 0 if everything fits, else 1; then other settings are tried, and those that fit are
printed.
"""

from __future__ import annotations

import sys
from typing import cast

from absl import app, flags

from espl_jax.console import command_line
from espl_jax.plan.advice import advice
from espl_jax.plan.chips import find_chip
from espl_jax.plan.costs import EVALUATED, plan
from espl_jax.plan.report import report
from espl_jax.run.check_config import check_config
from espl_jax.run.config import Config
from espl_jax.run.workloads import Lengths

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, e.g. v5e:4x4, v5p:2x2x2, v6e:2x4.")
_SYSTEM = flags.DEFINE_integer("system_tokens", 1024, "Tokens of the longest system prompt.")
_PROBLEM = flags.DEFINE_integer(
    "problem_tokens", 512, "Tokens of the longest problem, its turn's frame included."
)
_EVALUATED = flags.DEFINE_integer(
    "evaluated_problems", EVALUATED, "Problems of the validation set, and of the test set."
)
_CODEGEN = flags.DEFINE_bool(
    "codegen", False, "Generate code too: takes ten times as long, and finds kernels too large for the chip."
)
_ADVICE = flags.DEFINE_bool("advice", True, "Try other settings where these do not fit.")


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 1 if the run does not fit."""
    if len(argv) > 1:
        sys.exit(f"not understood: {' '.join(argv[1:])}; fields are set as --config.name=value")
    config, topology = cast(Config, _CONFIG.value), _TOPOLOGY.value
    assert topology is not None
    try:
        check_config(config, files=False)
        find_chip(topology)
    except ValueError as error:
        sys.exit(str(error))
    lengths = Lengths(_SYSTEM.value, _PROBLEM.value, config.sampling.max_new_tokens)
    with command_line.without_traceback():
        result = plan(
            config,
            topology,
            lengths,
            evaluated=_EVALUATED.value,
            codegen=_CODEGEN.value,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(report(result))
        if result.fits:
            return
        found = advice(config, topology, lengths, _EVALUATED.value) if _ADVICE.value else []
        if _ADVICE.value:
            print("\nThese would fit:" if found else "\nNothing that was tried would fit.")
        for line in found:
            print(f"  {line}")
    sys.exit(1)


def run() -> None:
    """The console script `espl-plan`."""
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()
