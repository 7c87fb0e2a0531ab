"""What evolution accepts of the edits proposed: each check keeps some and names those it drops."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

from espl_jax.evolution.edits import Drop, Edit, Merge, Remove, Replace, describe, partition
from espl_jax.types import Problem, SystemPrompt

Checked = tuple[tuple[Edit, ...], tuple[Drop, ...]]
"""(edits kept, drops with their reasons)."""


@dataclasses.dataclass(frozen=True)
class Guards:
    """Limits that keep prompts short, general and new. What each refuses is counted under its reason.

    Attributes:
      max_edits: K_ops, edits of one critique; `too_many`.
      max_words: of one principle. It is asked for, then asked for again (`retried`), then the principle is
        cut at a sentence (`shortened`).
      word_retries: how often a reply with too long a principle is asked for again.
      max_principles: of one prompt; an edit that would make more is refused (`no_room`). None: no limit.
      max_prompt_tokens: of one prompt; an edit that would make more is refused (`over_budget`), but one that
        makes a prompt shorter never is. None: no limit.
      copied_tokens: an edit with a run of so many tokens of a problem is refused, and one with the whole of a
        shorter problem (`copies_problem`); 0: not looked at.
      copied_answers: refuse edits that hold the answer to a problem of the iteration (`copies_answer`).
      max_reply_tokens: of one reply of the reflector; edits in replies kept to a schema are shorter.
      tokenize: text in, tokens out; words by default.
      problems: those that no edit may copy, beside the iteration's: the training problems.
    """

    max_edits: int = 2
    max_words: int = 32
    word_retries: int = 1
    max_principles: int | None = None
    max_prompt_tokens: int | None = None
    copied_tokens: int = 12
    copied_answers: bool = True
    max_reply_tokens: int = 2048
    tokenize: Callable[[str], Sequence[Hashable]] = str.split
    problems: Sequence[Problem] = ()

    def too_long(self, edit: Edit) -> bool:
        """Whether an edit's principle has more than `max_words` words; prose has no such limit."""
        return len(getattr(edit, "principle", "").split()) > self.max_words

    def why_too_large(self, prompt: SystemPrompt, before: SystemPrompt) -> str:
        """Why an edit may not make this prompt of the one before, or nothing."""
        count, had = len(prompt.principles), len(before.principles)
        if self.max_principles is not None and count > max(self.max_principles, had):
            return "no_room"
        if self.max_prompt_tokens is not None:
            tokens = len(self.tokenize(prompt.render()))
            if tokens > self.max_prompt_tokens and tokens > len(self.tokenize(before.render())):
                return "over_budget"
        return ""

    @functools.cached_property
    def training_runs(self) -> dict[int, set[int]]:
        """Runs of tokens of the training problems, see `runs_of`."""
        return runs_of(self.problems, self.tokenize, self.copied_tokens)


def drop_not_allowed(edits: Sequence[Edit], allowed: tuple[type, ...]) -> Checked:
    """Keeps the operations that a stage offers."""
    return partition(edits, "not_allowed", lambda edit: isinstance(edit, allowed))


def drop_excess(edits: Sequence[Edit], max_edits: int) -> Checked:
    """Keeps the first `max_edits`."""
    return tuple(edits[:max_edits]), tuple(("too_many", describe(edit)) for edit in edits[max_edits:])


def drop_repeats(edits: Sequence[Edit], entries: Mapping[str, str]) -> Checked:
    """Keeps the edits whose principle is new: neither in `entries` (id -> text) nor given by an earlier edit.

    A merge may keep the text of one that it merges. Case and punctuation make no difference.
    """
    given: set[tuple[str, ...]] = set()

    def is_new(edit: Edit) -> bool:
        if isinstance(edit, Remove | Replace):
            return True
        own = edit.ids if isinstance(edit, Merge) else ()
        text = words(edit.principle)
        new = text not in given and all(text != words(entries[name]) for name in entries if name not in own)
        given.add(text)
        return new

    return partition(edits, "repeat", is_new)


def drop_copies(edits: Sequence[Edit], problems: Sequence[Problem], guards: Guards) -> Checked:
    """Keeps the edits that give away no problem, lest the prompt learn the training set by heart.

    A problem is copied by a run of `copied_tokens` of its tokens or, if it has fewer (but four), by all of
    them, case and punctuation aside: any training problem. A problem of the iteration, which is what the
    reflector has seen, is copied too by all of its numbers of two digits or more, if it has two of them, and
    its answer by the same words; an answer of a single character is in every other sentence, and is let pass.
    """
    runs, numbers, answers = {}, [], set()
    if guards.copied_tokens:
        runs = runs_of(problems, guards.tokenize, guards.copied_tokens)
        numbers = [_long_numbers(words(problem.text)) for problem in problems]
    if guards.copied_answers:
        answers = {words(problem.answer) for problem in problems if len("".join(words(problem.answer))) > 1}

    def why(edit: Edit) -> str:
        text = " ".join(words(_said(edit)))
        tokens, said = guards.tokenize(text), tuple(text.split())
        known = (runs, guards.training_runs)
        if any(_holds_run(tokens, found) for found in known) or any(each <= {*said} for each in numbers):
            return "copies_problem"
        return "copies_answer" if any(_contains(said, answer) for answer in answers) else ""

    reasons = [why(edit) for edit in edits]
    return (
        tuple(edit for edit, reason in zip(edits, reasons, strict=True) if not reason),
        tuple((reason, describe(edit)) for edit, reason in zip(edits, reasons, strict=True) if reason),
    )


def drop_too_large(
    edits: Sequence[Edit], apply: Callable[[Sequence[Edit]], SystemPrompt], guards: Guards
) -> Checked:
    """Keeps the edits, one after another, that leave the prompt within its limits.

    Args:
      edits: in the order in which they are weighed.
      apply: the prompt that some of the edits make, in that order.
      guards: the limits.
    """
    kept: list[Edit] = []
    drops: list[Drop] = []
    before = apply(kept)
    for edit in edits:
        after = apply([*kept, edit])
        if reason := guards.why_too_large(after, before):
            drops.append((reason, describe(edit)))
        else:
            kept.append(edit)
            before = after
    return tuple(kept), tuple(drops)


def runs_of(
    problems: Sequence[Problem], tokenize: Callable[[str], Sequence[Hashable]], length: int
) -> dict[int, set[int]]:
    """Hashes of runs of tokens that stand for problems: run length -> hashes.

    A problem stands for all its runs of `length` tokens or, if it has fewer but at least four, for itself.
    """
    runs: dict[int, set[int]] = collections.defaultdict(set)
    for problem in problems if length else ():
        tokens = tuple(tokenize(" ".join(words(problem.text))))
        size = min(length, len(tokens))
        if size >= min(4, length):
            runs[size].update(hash(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
    return dict(runs)


def shorten(principle: str, max_words: int) -> str:
    """At most `max_words` words: cut after the last sentence that fits, else at the limit."""
    found = principle.split()
    if len(found) <= max_words:
        return principle
    for length in range(max_words, 3, -1):
        if found[length - 1][-1] in ".!?":
            return " ".join(found[:length])
    return " ".join(found[:max_words]).rstrip(",;:")


def shorten_edits(edits: Sequence[Edit], guards: Guards) -> tuple[tuple[Edit, ...], int]:
    """The edits with their principles cut by `shorten`, and how many were cut."""
    cut = sum(map(guards.too_long, edits))
    return tuple(
        dataclasses.replace(edit, principle=shorten(edit.principle, guards.max_words))
        if guards.too_long(edit)
        else edit
        for edit in edits
    ), cut


def words(text: str) -> tuple[str, ...]:
    """The words and numbers of a text in lower case."""
    return tuple(re.findall(r"\w+", text.lower()))


def _said(edit: Edit) -> str:
    """What an edit brings into the prompt."""
    return edit.replace if isinstance(edit, Replace) else getattr(edit, "principle", "")


def _holds_run(tokens: Sequence[Hashable], runs: Mapping[int, set[int]]) -> bool:
    return any(
        hash(tuple(tokens[i : i + size])) in hashes
        for size, hashes in runs.items()
        for i in range(len(tokens) - size + 1)
    )


def _contains(said: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(said[i : i + len(part)] == part for i in range(len(said) - len(part) + 1))


def _long_numbers(text: tuple[str, ...]) -> set[str]:
    """A problem's numbers of two digits or more; a set that nothing contains if there are fewer than two."""
    numbers = {word for word in text if word.isdigit() and len(word) > 1}
    return numbers if len(numbers) > 1 else {""}
