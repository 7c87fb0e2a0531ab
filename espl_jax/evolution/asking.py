"""Asking any reflector, in two steps where it cannot reason first by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

from espl_jax.types import (
    Answerer,
    Conversation,
    Grammar,
    Question,
    Reflect,
    Reply,
    is_answerer,
)


def ask_all(reflect: Reflect | Answerer, questions: Sequence[Question]) -> list[Reply | None]:
    """The replies of any reflector; of a plain function in two steps where it is to reason first."""
    if is_answerer(reflect):
        return list(reflect.ask(questions))
    function = cast(Reflect, reflect)

    def answer(conversations: list[Conversation], _: list[Grammar | None]) -> list[Reply | None]:
        return [None if text is None else Reply(text=text) for text in function(conversations)]

    return in_two_steps(answer, questions)


def in_two_steps(
    answer: Callable[[list[Conversation], list[Grammar | None]], list[Reply | None]],
    questions: Sequence[Question],
) -> list[Reply | None]:
    """Asks for brief reasoning first, and then for the reply in another conversation that contains it.

    Args:
      answer: one turn: conversations and grammars in, replies out.
      questions: all of one stage. Reasoning that was cut off ends a question.
    """
    brief = [question.reasoning == "brief" for question in questions]
    conversations = [question.conversation for question in questions]
    replies = answer(conversations, [None if b else q.grammar for b, q in zip(brief, questions, strict=True)])
    if not any(brief) or len(replies) != len(questions):
        return replies
    reasoned: dict[int, str] = {}
    for i, reply in enumerate(replies):
        if brief[i] and reply is not None:
            if reply.ended:
                reasoned[i] = reply.text
            else:
                replies[i] = Reply(text="", reasoning=reply.text, ended=False)
    if not reasoned:
        return replies
    second = answer(
        [after_reasoning(questions[i], text) for i, text in reasoned.items()],
        [questions[i].grammar for i in reasoned],
    )
    for (i, text), reply in zip(reasoned.items(), second, strict=True):
        replies[i] = reply and dataclasses.replace(reply, reasoning=text)
    return replies


def after_reasoning(question: Question, reasoning: str) -> Conversation:
    """The conversation that asks for the reply after brief reasoning."""
    return [
        *question.conversation,
        {"role": "assistant", "content": reasoning},
        {"role": "user", "content": question.request},
    ]
