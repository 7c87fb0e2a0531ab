"""Checks that every token that can occur in a run has a row in the model's embedding."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat import render


def check_vocabulary(
    source: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, stop_ids: Sequence[int]
) -> None:
    """Rejects tokens beyond the embedding, for which a gather would silently return another row.

    Special tokens that occur only if a text spells them are allowed: many tokenizers have some that the model
    does not support (the image token of Gemma 3 1B, an added padding token).

    Args:
      source: source of the model, for messages.
      tokenizer: its tokenizer, or None.
      vocab_size: rows of its embedding.
      stop_ids: tokens that end its replies.

    Raises:
      ValueError: with the first such token that ends a reply, is in the chat template, or may occur in text.
    """
    for stop in stop_ids:
        if stop >= vocab_size:
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(stop)!r})"
            raise ValueError(
                f"{source}: eos_token_id={stop}{token} is outside the model's vocabulary, "
                f"vocab_size={vocab_size}; correct generation_config.json, or use the tokenizer of the model"
            )
    if tokenizer is None:
        return
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    added = tokenizer.added_tokens_decoder
    written = _written(tokenizer) if beyond else ""
    for i, token in sorted(beyond.items()):
        in_template, special = token in written, i in added and added[i].special
        if in_template or not special:
            where = "its chat template writes it" if in_template else "any text may contain it"
            raise ValueError(
                f"{source}: the tokenizer's {token!r} has id {i}, past the model's vocab_size={vocab_size}, "
                f"and {where}; use the tokenizer that the model was trained with, or resize the embedding"
            )


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the sources of the chat templates and conversations rendered with them."""
    template = tokenizer.chat_template
    if template is None:
        return ""
    system, user, assistant = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    parts = list(template.values()) if isinstance(template, dict) else [template]
    for messages in ([user], [system, user], [user, assistant, user]):
        try:
            parts.append(render(tokenizer, messages))
        except ValueError:
            continue  # such conversations do not occur
    return "\n".join(parts)
