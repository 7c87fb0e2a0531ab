"""Whether every token that a run can meet has a row in the model's embedding."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat import render


def check_vocabulary(
    source: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, stop_ids: Sequence[int]
) -> None:
    """Refuses tokens past the embedding, of which a gather would read another row without a word.

    Special tokens that only a text naming them could bring are let pass: many tokenizers have one that their
    model was not made for (Gemma 3 1B's for images, a padding token that was added).

    Args:
      source: what the model was loaded from.
      tokenizer: its tokenizer, if it has one.
      vocab_size: rows of its embedding.
      stop_ids: tokens that end its replies.

    Raises:
      ValueError: naming the first token that its template writes, that ends a reply, or that a text becomes.
    """
    for stop in stop_ids:
        if stop >= vocab_size:
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(stop)!r})"
            raise ValueError(
                f"{source}: eos_token_id={stop}{token} is outside the model's vocabulary, "
                f"vocab_size={vocab_size}; correct generation_config.json, or take the model's own tokenizer"
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
                f"and {where}; take the tokenizer that the model was trained with, or resize its embedding"
            )


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template spells, in its source or when it is rendered."""
    template = tokenizer.chat_template
    if template is None:
        return ""
    system, user, assistant = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    parts = list(template.values()) if isinstance(template, dict) else [template]
    for messages in ([user], [system, user], [user, assistant, user]):
        try:
            parts.append(render(tokenizer, messages))
        except ValueError:
            continue  # such a conversation never comes about
    return "\n".join(parts)
