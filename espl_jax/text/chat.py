"""Renders conversations with the chat template of the model, and splits them for the prefix tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from espl_jax.text import harmony
from espl_jax.text.chat_template import apply_chat_template
from espl_jax.text.control_tokens import without_control_tokens
from espl_jax.types import Conversation, Message

TURN_HEADER = 16
"""Maximum tokens that a template writes between its last added token and the text of the user turn."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> str:
    """Renders a conversation as text, up to where the model continues.

    Uses the chat template of the tokenizer, with its generation prompt. Control tokens are removed from all
    texts (`without_control_tokens`), so that only the template begins and ends turns. If the last message is
    from the assistant, it is an opening: it follows the generation prompt, and the model continues it. Where
    templates write channels (`text.harmony`), it begins the channel final or, after `<think>`, analysis. A
    blank system message is dropped, so that the default of the template, if any, applies.

    If the template has no system role, the system text goes in front of the first user turn, followed by a
    blank line.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: at least one; the last is from the user, or an opening of the assistant.
      **chat_template_kwargs: passed to the template (`enable_thinking`, ...).

    Raises:
      ValueError: for a conversation without a user turn, or one that the template rejects; for a tokenizer
        without a chat template, or with several templates but no default.
    """
    messages = without_control_tokens(tokenizer, list(messages))
    if "tools" in chat_template_kwargs:
        chat_template_kwargs["tools"] = without_control_tokens(tokenizer, chat_template_kwargs["tools"])
    turns = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    opening = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("the conversation has no user turn; add at least one message with role user")
    if turns[0]["role"] == "system" and not has_system_role(tokenizer, **chat_template_kwargs):
        turns = _system_in_user_turn(turns)
    if opening and harmony.is_format_of(tokenizer):
        opening = harmony.opening(opening)
    try:
        return apply_chat_template(tokenizer, turns, **chat_template_kwargs) + opening
    except TemplateError as error:
        raise ValueError(
            f"the chat template rejects this conversation: {error}; use another template, or other "
            "chat_template_kwargs"
        ) from error


def has_system_role(tokenizer: PreTrainedTokenizerBase, **chat_template_kwargs: Any) -> bool:
    """Returns whether the template writes system messages. Tries one, since some templates raise and others
    drop it silently."""
    system = "the system message of a trial"
    trial = [{"role": "system", "content": system}, {"role": "user", "content": "a"}]
    try:
        return system in apply_chat_template(tokenizer, trial, **chat_template_kwargs)
    except TemplateError:
        return False


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> tuple[list[int], list[int]]:
    """Tokenizes a conversation, split where the prefix tree branches from system prompt to problem.

    The conversation is rendered and tokenized as a whole, so the two parts together are exactly the tokens
    without sharing. The split is right after the last added token (e.g. a special token) before the text of
    the last user turn: no merge of the tokenizer crosses it, and its position is the same for every text of
    that turn. If there is a long text between that token and the text of the user (some templates put the
    system text into the user turn), the split is later: one token before the position at which the tokens
    begin to depend on the text of that turn.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: as for `render`, with at least one user turn.
      **chat_template_kwargs: passed to the template.

    Returns:
      (system_tokens, rest_tokens), each with at least one token.

    Raises:
      ValueError: as `render`, or if the conversation is shorter than two tokens.
    """
    tokens = encode(tokenizer, render(tokenizer, messages, **chat_template_kwargs))
    if len(tokens) < 2:
        raise ValueError(f"the conversation has {len(tokens)} tokens, but needs at least two, one per level")
    one, other = _with_other_user_texts(tokenizer, messages, **chat_template_kwargs)
    before = encode(tokenizer, one[: common_length(one, other)])
    added = _added_ids(tokenizer)
    count = sum(token in added for token in before)
    places = [i + 1 for i, token in enumerate(tokens) if token in added]
    cut = places[count - 1] if count else 1
    if len(before) - cut > TURN_HEADER:
        one, other = encode(tokenizer, one), encode(tokenizer, other)
        cut = max(cut, min(common_length(one, tokens), common_length(other, tokens)) - 1)
    cut = min(cut, len(tokens) - 1)
    return tokens[:cut], tokens[cut:]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text, without adding special tokens: templates write those themselves."""
    return tokenizer.encode(text, add_special_tokens=False)


def cut_middle(tokens: Sequence[int], limit: int, mark_tokens: Sequence[int]) -> list[int]:
    """Cuts the middle out of a long text and replaces it by a mark.

    Args:
      tokens: the text.
      limit: maximum number of tokens to return, including the mark.
      mark_tokens: the mark, which shows that something was cut.

    Returns:
      `tokens` if they fit, otherwise exactly `limit` tokens; if uneven, the head gets one more than the tail.

    Raises:
      ValueError: if the text must be cut and `limit` leaves no room besides the mark.
    """
    if len(tokens) <= limit:
        return list(tokens)
    kept = limit - len(mark_tokens)
    if kept < 1:
        raise ValueError(
            f"limit={limit}: no room besides a mark of {len(mark_tokens)} tokens; raise the limit"
        )
    tail = kept // 2
    return [*tokens[: kept - tail], *mark_tokens, *tokens[len(tokens) - tail :]]


def _system_in_user_turn(turns: Conversation) -> Conversation:
    system, *rest = turns
    first = next(i for i, turn in enumerate(rest) if turn["role"] == "user")
    user = rest[first]
    rest[first] = {**user, "content": f"{system['content']}\n\n{user['content']}"}
    return rest


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the length of the common prefix."""
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


def _with_other_user_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> tuple[str, str]:
    """Renders the conversation with two other texts in its last user turn, which differ from the start.

    Templates may strip or move the text; it begins where the two results differ.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")

    def with_text(text: str) -> str:
        changed = [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]
        return render(tokenizer, changed, **chat_template_kwargs)

    one, other = with_text("a"), with_text("b")
    if one == other:
        raise ValueError(
            "the chat template does not write the text of the last user turn; use another template"
        )
    return one, other


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the added tokens, which are matched before tokenization, except `single_word` tokens, whose
    match depends on what follows."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if not token.single_word)})
