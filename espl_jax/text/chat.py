"""Conversations as the model's own chat template writes them, and where they are cut for the prefix tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from espl_jax.text.chat_template import apply_chat_template
from espl_jax.text.control_tokens import without_control_tokens
from espl_jax.types import Conversation, Message

TURN_HEADER = 16
"""Most tokens that a template writes between its last added token and the user's text for the turn itself."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> str:
    """The text of a conversation up to where the model writes on.

    The model's own template is used, with its generation prompt. Every text enters it without control tokens,
    see `without_control_tokens`: the template alone begins and ends turns. A last message of the assistant's
    is an opening: it follows the generation prompt, and the model continues it. A blank system message is
    left out, so that the template's own default (if it has one) applies.

    Where the template has no system role, the system text begins the first user turn, with a blank line after
    it.

    Args:
      tokenizer: with a chat template.
      messages: at least one, the last of the user's or an opening of the assistant's.
      **chat_template_kwargs: passed to the template (`enable_thinking`, ...).

    Raises:
      ValueError: for a conversation without a user turn, or one that the template refuses for another
        reason; for a tokenizer without a chat template, or with several of which none is to be used.
    """
    messages = without_control_tokens(tokenizer, list(messages))
    if "tools" in chat_template_kwargs:
        chat_template_kwargs["tools"] = without_control_tokens(tokenizer, chat_template_kwargs["tools"])
    turns = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    opening = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("the conversation has no user turn; give at least one message of role user")
    if turns[0]["role"] == "system" and not has_system_role(tokenizer, **chat_template_kwargs):
        turns = _system_in_user_turn(turns)
    try:
        return apply_chat_template(tokenizer, turns, **chat_template_kwargs) + opening
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses this conversation: {error}; use another template, or other "
            "chat_template_kwargs"
        ) from error


def has_system_role(tokenizer: PreTrainedTokenizerBase, **chat_template_kwargs: Any) -> bool:
    """Whether the template writes system messages: found out by trying one, since some templates raise and
    some drop it silently."""
    system = "the system message of a trial"
    trial = [{"role": "system", "content": system}, {"role": "user", "content": "a"}]
    try:
        return system in apply_chat_template(tokenizer, trial, **chat_template_kwargs)
    except TemplateError:
        return False


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, cut where the prefix tree branches from system prompt to problem.

    The conversation is rendered whole and tokenized whole, so that the two parts together are exactly the
    tokens without any sharing. The cut comes right after the last added token (special ones are) before the
    last user turn's text, a place where no merge of the tokenizer can reach across and which is the same for
    every text of that turn. Where a long text lies between that token and the user's (some templates put the
    system text into the user turn), the cut comes later: one token before the place up to which two other
    texts in that turn would give the same tokens as this one.

    Args:
      tokenizer: with a chat template.
      messages: as for `render`, with at least one user turn.
      **chat_template_kwargs: passed to the template.

    Returns:
      (system_tokens, rest_tokens), each with at least one token.

    Raises:
      ValueError: as `render`, or if the conversation is shorter than two tokens.
    """
    tokens = encode(tokenizer, render(tokenizer, messages, **chat_template_kwargs))
    if len(tokens) < 2:
        raise ValueError(f"the conversation has {len(tokens)} tokens; two at least are needed, one a level")
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
    """Tokens of a text as it stands; templates write the special tokens themselves."""
    return tokenizer.encode(text, add_special_tokens=False)


def cut_middle(tokens: Sequence[int], limit: int, mark_tokens: Sequence[int]) -> list[int]:
    """Shortens a long text to its head and its tail, with a mark between them.

    Args:
      tokens: the text.
      limit: the most tokens to return, the mark included.
      mark_tokens: what says that something was left out.

    Returns:
      `tokens` if they fit, otherwise exactly `limit` tokens; an odd one goes to the head.

    Raises:
      ValueError: if the text must be cut and `limit` leaves no token beside the mark.
    """
    if len(tokens) <= limit:
        return list(tokens)
    kept = limit - len(mark_tokens)
    if kept < 1:
        raise ValueError(
            f"limit={limit} leaves no room beside a mark of {len(mark_tokens)} tokens; raise the limit"
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
    """How many first elements are the same."""
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


def _with_other_user_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **chat_template_kwargs: Any
) -> tuple[str, str]:
    """The conversation rendered with two other texts in its last user turn, which differ at once.

    Templates may strip the text or put it anywhere: where these two part is where the text begins.
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
    """Tokens that are found in a text before any others; those that must be words of their own depend on what
    follows."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if not token.single_word)})
