"""Tells whether a run fits on a TPU slice, with a lower bound on the time of an iteration; needs no TPU.

    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5e:4x4
    python -m espl_jax.plan --config=configs/hmmt.py --topology=v5p:2x2x2 --config.mesh.tensor=4

This machine compiles every program of the run for that topology with the TPU compiler, up to buffer
assignment, or with `--codegen` to the end. The programs are:

- rollouts: prefill, the decode chunk of every bucket at full width, and admitting, moving and extending rows;
- reflection on device and evaluation: the same at the largest bucket, with constrained decoding;
- updates: the policy-gradient step, and scoring if a batch has several updates.

For each program it prints the HBM of a device, the flops, the bytes moved, and the larger of the two time
bounds that follow. As in the run, sampling reserves as many slots as memory holds. No weights are allocated;
for a model on the Hub, only config.json is downloaded.

The iteration is the longest possible: every rollout draws max_new_tokens, every group has a gradient, and
prompts have the lengths given by the flags. Reflection and evaluation are not included. The bounds assume the
peak rates of the chip and ignore communication between devices.

The exit code is 0 if everything fits, else 1. In that case other settings are tried, and those that fit are
printed.
"""

from __future__ import annotations

import sys
from typing import cast

from absl import app, flags

from espl_jax.console import command_line
from espl_jax.plan.advice import advice
from espl_jax.plan.chips import find_chip
from espl_jax.plan.costs import EVALUATED, TOKENS_PER_STEP, plan
from espl_jax.plan.report import report
from espl_jax.run.check_config import check_config
from espl_jax.run.config import Config
from espl_jax.run.workloads import Lengths

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, e.g. v5e:4x4, v5p:2x2x2, v6e:2x4.")
_SYSTEM = flags.DEFINE_integer("system_tokens", 1024, "Length of the longest system prompt, in tokens.")
_PROBLEM = flags.DEFINE_integer(
    "problem_tokens", 512, "Length of the longest problem, including its chat template tokens."
)
_EVALUATED = flags.DEFINE_integer(
    "evaluated_problems", EVALUATED, "Size of the validation set, and of the test set."
)
_TOKENS_PER_STEP = flags.DEFINE_float(
    "tokens_per_step", TOKENS_PER_STEP, "Tokens that a row draws in a decode step, if there are drafts.", 1.0
)
_CODEGEN = flags.DEFINE_bool(
    "codegen", False, "Also generate code: ten times slower, but finds kernels that exceed VMEM."
)
_ADVICE = flags.DEFINE_bool("advice", True, "If the run does not fit, try other settings.")


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 1 if the run does not fit."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; set fields with --config.field=value")
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
            tokens_per_step=_TOKENS_PER_STEP.value,
            codegen=_CODEGEN.value,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(report(result))
        if result.fits:
            return
        found = advice(config, topology, lengths, _EVALUATED.value) if _ADVICE.value else []
        if _ADVICE.value:
            print("\nThese settings would fit:" if found else "\nNone of the settings tried would fit.")
        for line in found:
            print(f"  {line}")
    sys.exit(1)


def run() -> None:
    """The console script `espl-plan`."""
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    run()
