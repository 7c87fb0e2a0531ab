"""Writes the text files of an exported folder: tokenizer, chat template, system prompt, model card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat import has_system_role
from espl_jax.text.chat_template import TRIAL_TOOL, WITH_TOOLS, named_templates
from espl_jax.text.control_tokens import without_control_tokens
from espl_jax.text.template_defaults import with_default_arguments, with_default_system
from espl_jax.types import SystemPrompt


def write_text_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    system_prompt: SystemPrompt | str | None = None,
    model_card: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes the tokenizer's files, its chat templates, `system_prompt.txt` and `README.md`.

    A non-blank system prompt becomes the default system message of every chat template, and
    `template_arguments` become defaults of their arguments. As in the run, control tokens are removed from
    the prompt.

    Raises:
      ValueError: if there is a system prompt but no chat template.
    """
    system = system_prompt.render() if isinstance(system_prompt, SystemPrompt) else system_prompt
    if system is not None:
        system = system if tokenizer is None else without_control_tokens(tokenizer, system)
        (folder / "system_prompt.txt").write_text(system, encoding="utf-8", newline="")
    if model_card is not None:
        (folder / "README.md").write_text(model_card, encoding="utf-8")
    said, arguments = bool(system and system.strip()), dict(template_arguments or {})
    if tokenizer is None:
        if said:
            raise ValueError(
                "tokenizer=None: a system prompt needs a chat template; give a tokenizer, or no system prompt"
            )
        return
    templates = named_templates(tokenizer)
    if said and not templates:
        raise ValueError(
            "system_prompt: the tokenizer has no chat_template to add it to; set tokenizer.chat_template, or "
            "give no system prompt"
        )
    saved = copy.copy(tokenizer)
    for name, template in templates.items():
        saved.chat_template = template
        tried = arguments | ({"tools": [TRIAL_TOOL]} if name == WITH_TOOLS else {})
        spoken = with_default_system(template, system or "", has_system_role(saved, **tried))
        templates[name] = with_default_arguments(spoken, arguments)
    saved.chat_template = templates if isinstance(tokenizer.chat_template, dict) else templates.get("default")
    saved.save_pretrained(folder)
    _readable_by_older_versions(folder / "tokenizer_config.json")
    # Converters to other formats need this file.
    sentencepiece = Path(tokenizer.name_or_path or ".") / "tokenizer.model"
    if sentencepiece.is_file():
        shutil.copy(sentencepiece, folder / sentencepiece.name)


def _readable_by_older_versions(path: Path) -> None:
    """Rewrites the tokenizer config of transformers 5 so that version 4 reads it too, and removes fields
    about the source of the tokenizer."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):
        fields.pop(name, None)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
