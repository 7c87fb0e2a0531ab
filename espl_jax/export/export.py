"""Exports the weights, the evolved system prompt and a model card of a run, for use by other libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from espl_jax.export.model_card import hub_name, model_card, serve_adapter
from espl_jax.models.config import dtype_name
from espl_jax.pretrained.new_folder import check_free
from espl_jax.pretrained.peft import save_adapter
from espl_jax.pretrained.save import save_pretrained
from espl_jax.pretrained.shards import DTYPES as DTYPES_WRITTEN
from espl_jax.run.check_groups import trains
from espl_jax.run.saved import SavedRun, read_run
from espl_jax.run.tasks import tools_of
from espl_jax.storage.workdir import read_log
from espl_jax.text.chat_template import template_file
from espl_jax.types import Schema

FORMATS = ("merged", "adapter")


def export(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "merged",
    prompt: str = "deployed",
    dtype: DTypeLike = "bfloat16",
    base: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Writes the newest checkpoint of a run, which may still be running, in a standard format.

    Args:
      workdir: work directory of the run; read-only.
      out: the output folder, written atomically; must be new or empty.
      format: `merged`, full weights for transformers and compatible servers; `adapter`, only the LoRA
        adapters, for PEFT.
      prompt: `deployed`, `root`, or the id of a member of the population.
      dtype: dtype of merged weights, float32 or bfloat16, as a name or a jax or numpy dtype; adapters are
        always float32.
      base: public name of the model that the run started from; by default `model.source`.
      say: prints a line of progress.

    Raises:
      FileExistsError: if `out` is not empty.
      FileNotFoundError: if there is no run or no checkpoint, or the model of the run is missing.
      ValueError: for an unknown prompt or format, the adapters of a run without adapters, or damaged files.
    """
    dtype = dtype_name(dtype)
    for name, value, choices in (("format", format, FORMATS), ("dtype", dtype, tuple(DTYPES_WRITTEN))):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
    check_free(out)
    say(f"Reading {workdir}")
    run = read_run(workdir)
    chosen = run.prompt(prompt)
    if format == "adapter":
        _check_adapters(run, base)
    base = base or hub_name(run.config.model.source)
    say(f"Iteration {run.iteration} of {run.config.num_iterations}, prompt {chosen.id}; writing {out}")
    tools = _tools(run, say)
    template = template_file(run.model.tokenizer, with_tools=bool(tools))
    card = model_card(
        run.config.to_dict(),
        chosen,
        base=base,
        iteration=run.iteration,
        folder=Path(out).name,
        adapter=format == "adapter",
        template_file=template,
        tools=tools,
        results=_results(run),
        metrics=_metrics(run),
    )
    model = run.model
    arguments = json.loads(run.config.model.chat_template_kwargs)
    if format == "adapter":
        assert run.adapters is not None
        save_adapter(
            out,
            run.adapters,
            model.config,
            model.tokenizer,
            chosen,
            base=base,
            model_card=card,
            template_arguments=arguments,
        )
    else:
        save_pretrained(
            out,
            model.params,
            model.config,
            model.tokenizer,
            chosen,
            dtype=dtype,
            generation=_generation(run),
            model_card=card,
            template_arguments=arguments,
        )
    size = sum(file.stat().st_size for file in Path(out).expanduser().rglob("*") if file.is_file())
    say(f"Written to {out} ({size / 1e6:,.1f} MB): weights, tokenizer with chat template, prompt, README.md")
    if format == "adapter":
        say(f"Serve it:  {serve_adapter(base, os.fspath(out), run.config.lora.rank, template)}")
    else:
        say(f"Serve it:  transformers serve {out}   or   vllm serve {out}")


def _check_adapters(run: SavedRun, base: str) -> None:
    """Raises ValueError unless the run has adapters, for a base that others can load."""
    if run.adapters is None:
        why = "trains all weights (lora.rank=0)" if trains(run.config) else "changes only prompts"
        raise ValueError(
            f"format='adapter': a run of mode={run.config.mode} that {why} has no adapters; use format=merged"
        )
    source = run.config.model.source
    if not base and (Path(source).expanduser() / "adapter_config.json").is_file():
        raise ValueError(
            f"format='adapter': the run started from the adapter {source}, merged into its base; use "
            "format=merged, or give the folder or Hub name of these merged weights as base"
        )


def _generation(run: SavedRun) -> dict[str, Any]:
    """Returns the generation config, with the sampling settings of the run.

    Of the original settings only the token ids are kept, since the run sampled without penalties. Stop
    strings are in the model card, because servers reject them here.
    """
    sampling = run.config.sampling
    names = ("temperature", "top_p", "top_k", "min_p")
    drawn = {"do_sample": True} | {name: sampling.get(name, 0.0) for name in names}
    return {
        **{name: i for name, i in run.model.generation.items() if name.endswith("_token_id")},
        "eos_token_id": list(run.model.stop_ids),
        **(drawn if sampling.temperature else {"do_sample": False}),
    }


def _tools(run: SavedRun, say: Callable[[str], None]) -> tuple[Schema, ...]:
    """Returns the tools of the run's environment; none if its module is not installed here."""
    try:
        return tools_of(run.config)
    except ValueError as error:
        say(f"The model card lists no tools: {error}")
        return ()


def _results(run: SavedRun) -> dict[str, Any] | None:
    """Returns the contents of `results.json`, if it belongs to this checkpoint (the last of the run)."""
    path = run.path / "results.json"
    if run.iteration < run.config.num_iterations or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _metrics(run: SavedRun) -> dict[str, Any] | None:
    """Returns the line of `metrics.jsonl` for this checkpoint; the run may have written later lines."""
    lines = read_log(run.path, "metrics")
    return json.loads(lines[run.iteration - 1]) if len(lines) >= run.iteration else None
