"""The command: `python -m espl_jax.export --workdir=runs/hmmt --out=exported`."""

from __future__ import annotations

import sys

from absl import app, flags

from espl_jax.console import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, which may be going on; only read.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; new or empty.")
_FORMAT = flags.DEFINE_string("format", "merged", "merged (whole weights) or adapter (LoRA, for PEFT).")
_PROMPT = flags.DEFINE_string("prompt", "deployed", "deployed, root, or the id of a prompt.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of merged weights: bfloat16 or float32.")
_BASE = flags.DEFINE_string("base", "", "What others call the base model; empty: the run's model.source.")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    """Exports a run."""
    if len(argv) > 1:
        sys.exit(f"not understood: {' '.join(argv[1:])}; see --help")
    workdir, out = _WORKDIR.value, _OUT.value
    assert workdir is not None and out is not None

    import jax

    # The devices may be busy with the run itself, and there is next to nothing to compute.
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
