"""What an exported folder holds beside its weights: tokenizer, chat template, system prompt, model card."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from espl_jax.text.chat import has_system_role
from espl_jax.text.default_system import with_default_system
from espl_jax.types import SystemPrompt


def write_text_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: SystemPrompt | str | None = None,
    model_card: str | None = None,
) -> None:
    """Writes the tokenizer's files, `chat_template.jinja`, `system_prompt.txt` and `README.md`.

    A system prompt that is not blank becomes the default system message of the chat template.

    Raises:
      ValueError: for a system prompt, but no chat template to speak it.
    """
    system = system_prompt.render() if isinstance(system_prompt, SystemPrompt) else system_prompt
    if system is not None:
        (folder / "system_prompt.txt").write_text(system, encoding="utf-8", newline="")
    if system and system.strip():
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                "the tokenizer has no chat_template (or several), so that the system prompt has no place in "
                "it; set tokenizer.chat_template, or leave the system prompt out"
            )
        template = with_default_system(tokenizer.chat_template, system, has_system_role(tokenizer))
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    # The name of the plain class in transformers 5; versions before know the other one, which both read.
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
    if model_card is not None:
        (folder / "README.md").write_text(model_card, encoding="utf-8")
