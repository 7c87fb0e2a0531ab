"""The README.md of an exported folder: what it is, how it was made, and how well it did."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espl_jax.console.tables import percent, table
from espl_jax.environments import boxed, search
from espl_jax.pretrained.named import BASES
from espl_jax.types import Schema, SystemPrompt

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told to make room for."""

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
"""Fields that say most about a run; the whole configuration follows them."""

_METHODS = {
    "espl": "the weights by policy gradients and the system prompt by evolution, both from the same rollouts",
    "rl": "the weights by policy gradients, under one system prompt",
    "evolution": "the system prompt by evolution; the weights are those of the base model",
    "reflection": "the system prompt, rewritten again and again by reflection on the model's own rollouts; "
    "the weights are those of the base model",
}


def hub_name(source: str) -> str:
    """What others call the model of `model.source`: its name on the Hugging Face hub (and revision, if it has
    one), or an absolute path.
    """
    if source in BASES:
        return BASES[source]
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() or source.endswith(".gguf") else source


def serve_adapter(base: str, folder: str, rank: int, template_file: str = "chat_template.jinja") -> str:
    """The command that serves an adapter with vLLM under its folder's `template_file`; requests name the
    model `evolved`."""
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
    """A model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
      config: of the run, nested dicts.
      prompt: the system prompt that is exported.
      base: what others call the model that the run began with.
      iteration: iterations done.
      folder: what to call the exported folder.
      adapter: whether it holds LoRA adapters for PEFT, and not whole weights.
      template_file: the chat template of the run's conversations, as a file of the folder.
      tools: of the run's environment, as JSON schemas.
      results: the run's `results.json`, if it came to its test.
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
        "## Licence\n\nThat of the base model, whose terms hold for everything derived from it.",
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
    what = "LoRA adapters for" if adapter else "A model made from"
    return (
        f"{what} `{base}` by Evolutionary System Prompt Learning (E-SPL), with espl_jax.\n\n"
        "In E-SPL several system prompts answer the same problems. Rewards, less the mean of their group, "
        "give a policy gradient for the weights; the ranking of the prompts gives each a TrueSkill rating; "
        "and the model, reflecting on its own rollouts, writes new prompts by mutation and crossover. "
        f"Learned here, in {iteration} of {config['num_iterations']} iterations (mode `{config['mode']}`): "
        f"{_METHODS[config['mode']]}."
    )


def _prompt(prompt: SystemPrompt) -> str:
    text = prompt.render()
    if not text.strip():
        return f"Prompt {prompt.id} is empty: the chat template is the base model's own."
    return (
        f"The chat template says it unasked wherever a conversation has no system message of its own "
        f"(`system_prompt.txt` has it too). It is prompt {prompt.id}, made by {prompt.operator} in iteration "
        f"{prompt.iteration}, with a rating of {prompt.mu:.2f} ± {prompt.sigma:.2f}.\n\n{_fenced(text)}"
    )


def _fenced(text: str, language: str = "") -> str:
    """A code block that nothing in the text can end."""
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
    elif instruction is None and name in ("math", "arithmetic") and environment["answer_format"] == "boxed":
        instruction = boxed.INSTRUCTION
    notes = []
    if tools:
        blocks = [_fenced(json.dumps(tool, indent=2), "json") for tool in tools]
        these = "this tool" if len(tools) == 1 else "these tools"
        notes.append("\n\n".join([f"In training it had {these}:", *blocks]))
    if adapter and base != config["model"]["source"]:
        notes.append(
            f"The adapters were trained on `{config['model']['source']}`, a copy that may be rounded."
        )
    if instruction:
        notes.append(f"Each problem was followed, in the user's turn, by:\n\n{_fenced(instruction)}")
    if kwargs := json.loads(config["model"]["chat_template_kwargs"]):
        notes.append(
            f"Unless told otherwise, the chat template takes `{json.dumps(kwargs)}`, as in training."
        )
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
        'messages = [{"role": "user", "content": "..."}]  # no system message: the template has it\n'
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
        parts.append("Exported while the run was going on: there was no test yet.")
    elif config["data"]["test"]:
        parts.append("The test at the end of the run was not finished when this was exported.")
    else:
        parts.append("The run had no test problems.")
    if metrics:
        names = ("reward", "success", "held_out", "entropy", "kl", "grad_norm")
        rows = [["of iteration", str(metrics["iteration"])]]
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
    return f"{table(rows)}\n\n<details><summary>The whole configuration</summary>\n\n{whole}\n\n</details>"
