"""Writes the model card (README.md) of an exported folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espl_jax.console.tables import percent, table
from espl_jax.environments import boxed, reasoning_gym, search
from espl_jax.pretrained.named import BASES
from espl_jax.types import Schema, SystemPrompt

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""

_SETTINGS = (
    "mode",
    "seed",
    "model.source",
    "lora.rank",
    "lora.targets",
    "num_prompts",
    "batch_size",
    "group_size",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.top_p",
    "sampling.min_p",
    "sampling.stop_strings",
    "sampling.max_new_tokens",
    "selection.strategy",
    "reflection.policy",
    "loss.kind",
    "loss.baseline",
    "loss.kl_coef",
    "optimizer.learning_rate",
    "environment.name",
    "environment.answer_format",
)
"""The most important fields of a run; the full configuration follows them."""

_METHODS = {
    "espl": "the weights by policy gradients and the system prompt by evolution, both from the same rollouts",
    "rl": "the weights by policy gradients, under one system prompt",
    "evolution": "the system prompt by evolution; the weights are those of the base model",
    "reflection": "the system prompt, rewritten in every iteration by reflection on rollouts; "
    "the weights are those of the base model",
}


def hub_name(source: str) -> str:
    """Returns the public name of `model.source`: its name on the Hugging Face Hub (with the revision, if
    given), or an absolute path.
    """
    if source in BASES:
        return BASES[source]
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() or source.endswith(".gguf") else source


def serve_adapter(base: str, folder: str, rank: int, template_file: str = "chat_template.jinja") -> str:
    """Returns the command that serves an adapter with vLLM and the chat template in `template_file`.

    Requests name the model `evolved`.
    """
    name, revision = _name_and_revision(base)
    words = ["vllm serve", name, *([f"--revision {revision}"] if revision else []), "--enable-lora"]
    words += [f"--max-lora-rank {next((r for r in _VLLM_RANKS if r >= rank), rank)}"]
    words += [f"--lora-modules evolved={folder}", f"--chat-template {folder}/{template_file}"]
    return " ".join(words)


def model_card(
    config: Mapping[str, Any],
    prompt: SystemPrompt,
    *,
    base: str,
    iteration: int,
    folder: str,
    adapter: bool = False,
    template_file: str = "chat_template.jinja",
    tools: Sequence[Schema] = (),
    results: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Returns a model card in Markdown, with front matter for the Hugging Face Hub.

    Args:
      config: the run's configuration, as nested dicts.
      prompt: the exported system prompt.
      base: public name of the model that the run started from.
      iteration: iterations done.
      folder: name of the exported folder.
      adapter: whether the folder holds LoRA adapters for PEFT instead of full weights.
      template_file: file name of the chat template in the folder.
      tools: tools of the run's environment, as JSON schemas.
      results: contents of the run's `results.json`, if the run has ended.
      metrics: the iteration's record in `metrics.jsonl`.
    """
    sections = [
        _front_matter(base, adapter),
        f"# {folder}\n\n{_summary(config, base, iteration, adapter)}",
        f"## System prompt\n\n{_prompt(prompt)}",
        f"## Use\n\n{_use(config, base, folder, adapter, template_file, tools)}",
        f"## Results\n\n{_results(config, iteration, results, metrics)}",
        f"## Data\n\n{_data(config['data'])}",
        f"## Settings\n\n{_settings(config)}",
        "## License\n\nThe license of the base model, whose terms apply to all derivatives.",
        "## Citation\n\nZhang, Chen and Stadie (2026): Evolutionary System Prompt Learning. "
        "[arXiv 2602.14697](https://arxiv.org/abs/2602.14697)",
    ]
    return "\n\n".join(sections) + "\n"


def _name_and_revision(base: str) -> tuple[str, str | None]:
    named = _HUB_NAME.fullmatch(base)
    return (named[1], named[2]) if named else (base, None)


def _front_matter(base: str, adapter: bool) -> str:
    lines = [f"base_model: {_name_and_revision(base)[0]}"] if _HUB_NAME.fullmatch(base) else []
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    lines += ["tags:", "- espl", "- system-prompt", *(["- lora"] if adapter else [])]
    return "\n".join(["---", *lines, "---"])


def _summary(config: Mapping[str, Any], base: str, iteration: int, adapter: bool) -> str:
    what = "LoRA adapters for" if adapter else "A model trained from"
    return (
        f"{what} `{base}` with Evolutionary System Prompt Learning (E-SPL), using espl_jax.\n\n"
        "In E-SPL, rollouts of the same problems are sampled under several system prompts. Rewards minus the "
        "mean of their group give a policy gradient for the weights; the ranking of the prompts updates "
        "their ratings; and a reflector writes new prompts from the rollouts, by mutation and crossover. "
        f"Trained here, in {iteration} of {config['num_iterations']} iterations (mode `{config['mode']}`): "
        f"{_METHODS[config['mode']]}."
    )


def _prompt(prompt: SystemPrompt) -> str:
    text = prompt.render()
    if not text.strip():
        return f"Prompt {prompt.id} is empty, so the chat template is that of the base model."
    return (
        f"The chat template inserts it into every conversation without a system message (it is also in "
        f"`system_prompt.txt`). It is prompt {prompt.id}, created by {prompt.operator} in iteration "
        f"{prompt.iteration}, with a rating of {prompt.mu:.2f} ± {prompt.sigma:.2f}.\n\n{_fenced(text)}"
    )


def _fenced(text: str, language: str = "") -> str:
    """Returns a code block with a fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _use(
    config: Mapping[str, Any],
    base: str,
    folder: str,
    adapter: bool,
    template_file: str,
    tools: Sequence[Schema],
) -> str:
    environment = config["environment"]
    name, instruction = environment["name"], environment["instruction"]
    if instruction is None and name == "search":
        instruction = search.INSTRUCTION
    elif instruction is None and name == "reasoning_gym":
        instruction = reasoning_gym.INSTRUCTIONS[environment["answer_format"]]
    elif instruction is None and name in ("math", "arithmetic") and environment["answer_format"] == "boxed":
        instruction = boxed.INSTRUCTION
    notes = []
    if tools:
        blocks = [_fenced(json.dumps(tool, indent=2), "json") for tool in tools]
        these = "this tool" if len(tools) == 1 else "these tools"
        notes.append("\n\n".join([f"In training the model had {these}:", *blocks]))
    if adapter and base != config["model"]["source"]:
        notes.append(
            f"The adapters were trained on `{config['model']['source']}`, a copy that may be quantized."
        )
    if instruction:
        notes.append(f"In training, each problem was followed in the user turn by:\n\n{_fenced(instruction)}")
    if kwargs := json.loads(config["model"]["chat_template_kwargs"]):
        notes.append(f"The chat template defaults to the arguments of training, `{json.dumps(kwargs)}`.")
    loading = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if adapter:
        loading = "from peft import PeftModel\n" + loading
        name, revision = _name_and_revision(base)
        which = f'"{name}", revision="{revision}"' if revision else f'"{name}"'
        model = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({which}), "{folder}")'
        command = serve_adapter(base, folder, config["lora"]["rank"], template_file)
        serving = f"{command}  # requests name the model evolved"
    else:
        model = f'AutoModelForCausalLM.from_pretrained("{folder}")'
        serving = f"vllm serve {folder}\ntransformers serve {folder}"
    code = (
        f'{loading}tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f"model = {model}\n"
        'messages = [{"role": "user", "content": "..."}]  # no system message: the template adds it\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        "reply = model.generate(**inputs, max_new_tokens=512)\n"
        'print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    return "\n\n".join([_fenced(code, "python"), _fenced(serving, "sh"), *notes])


def _results(
    config: Mapping[str, Any],
    iteration: int,
    results: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
) -> str:
    parts = []
    if results and results["test"]:
        test = results["test"]
        prompts = list(next(iter(test.values())))
        rows = [["weights", *(f"{name} prompt" for name in prompts)]]
        for weights, cells in test.items():
            scores = (percent(c["accuracy"], c["low"], c["high"]) for c in cells.values())
            rows.append([weights, *scores])
        cell = next(iter(test["initial"].values()))
        parts.append(
            f"Accuracy on the test problems ({cell['num_problems']}, {cell['num_samples']} samples of each, "
            f"temperature {config['evaluation']['temperature']}), with 95% intervals; the deployed prompt is "
            f"{results['deployed']['id']}:\n\n{table(rows)}"
        )
    elif iteration < config["num_iterations"]:
        parts.append("Exported before the end of the run: there are no test results.")
    elif config["data"]["test"]:
        parts.append("Exported before the test at the end of the run had finished.")
    else:
        parts.append("The run had no test problems.")
    if metrics:
        names = ("reward", "success", "held_out", "entropy", "kl", "grad_norm")
        rows = [["iteration", str(metrics["iteration"])]]
        rows += [[name, f"{metrics[name]:.4g}"] for name in names if metrics.get(name) is not None]
        parts.append(f"Training rollouts, and validation (`held_out`):\n\n{table(rows)}")
    return "\n\n".join(parts)


def _data(data: Mapping[str, Any]) -> str:
    validation = data["validation"] or f"{data['validation_count']} problems held out of training"
    sources = {"training": data["train"], "validation": validation, "test": data["test"] or "none"}
    return "\n".join(f"- {name}: `{source}`" for name, source in sources.items())


def _settings(config: Mapping[str, Any]) -> str:
    rows = [["setting", "value"]]
    for field in _SETTINGS:
        value: Any = config
        for name in field.split("."):
            value = value[name]
        rows.append([field, ", ".join(value) if isinstance(value, list | tuple) else str(value)])
    whole = _fenced(json.dumps(config, indent=2, sort_keys=True), "json")
    return f"{table(rows)}\n\n<details><summary>Full configuration</summary>\n\n{whole}\n\n</details>"
