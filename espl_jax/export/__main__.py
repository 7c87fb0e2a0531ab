"""Exports a run: `python -m espl_jax.export --workdir=runs/hmmt --out=exported`."""

from __future__ import annotations

import sys

from absl import app, flags

from espl_jax.console import command_line

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run, which may still be running; read-only."
)
_OUT = flags.DEFINE_string("out", None, "Output folder; must be new or empty.")
_FORMAT = flags.DEFINE_string("format", "merged", "merged (full weights) or adapter (LoRA, for PEFT).")
_PROMPT = flags.DEFINE_string(
    "prompt", "deployed", "deployed, root, or the id of a prompt in the population."
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Dtype of merged weights: bfloat16 or float32.")
_BASE = flags.DEFINE_string("base", "", "Public name of the base model; empty: the run's model.source.")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    """Exports a run."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {' '.join(argv[1:])}; see --help")
    workdir, out = _WORKDIR.value, _OUT.value
    assert workdir is not None and out is not None

    import jax

    # The run itself may be using the devices, and export computes next to nothing.
    jax.config.update("jax_platforms", "cpu")
    from espl_jax.export.export import export

    with command_line.without_traceback():
        export(
            workdir,
            out,
            format=_FORMAT.value,
            prompt=_PROMPT.value,
            dtype=_DTYPE.value,
            base=_BASE.value,
        )


def run() -> None:
    """The console script `espl-export`."""
    app.run(main)


if __name__ == "__main__":
    run()
