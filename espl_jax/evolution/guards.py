"""What evolution accepts of the edits proposed: each check keeps some and names those it drops."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeGuard

from espl_jax.evolution.edits import Add, Drop, Edit, Merge, Modify, Remove, Replace, describe, partition
from espl_jax.types import Problem, SystemPrompt

LONGEST_WORD = 12
"""Characters, its space included, that a word has at most on average."""

ECHOED_WORDS = 8
"""A run of this many words of a template is an echo of it, and so is a whole principle of three or more."""

SHARED_BY = 3
"""A run of tokens in more problems than so many tells none of them apart."""

_LATEX = {"frac", "dfrac", "tfrac", "left", "right", "text", "mathrm", "boxed"}
_COMMON_ANSWERS = {"yes", "true", "false", "none", "both", "all", "one", "two"}
_BEFORE_ANSWERS = {"answer", "is", "equals", "be", "say", "reply"}

Checked = tuple[tuple[Edit, ...], tuple[Drop, ...]]
"""(edits kept, drops with their reasons)."""


@dataclasses.dataclass(frozen=True)
class Guards:
    """Limits that keep prompts short, general and new. What each refuses is counted under its reason.

    Attributes:
      max_edits: K_ops, edits of one critique; `too_many`.
      max_words: of one principle. A longer one is asked for again (`retried`), then refused (`too_long`).
      word_retries: how often a reply with too long a principle is asked for again.
      max_principles: of one prompt; an edit that would make more is refused (`no_room`). None: no limit.
      max_prompt_tokens: of one prompt; an edit that would make more is refused (`over_budget`), but one that
        makes a prompt shorter never is. None: no limit.
      copied_tokens: an edit with a run of so many tokens of a problem is refused, and one with the whole of a
        shorter problem (`copies_problem`); 0: not looked at.
      copied_answers: refuse edits that hold the answer to a problem of the iteration (`copies_answer`).
      copied_templates: refuse edits that echo what the reflector was told (`copies_template`).
      copied_members: refuse mutations that repeat a principle of another member (`copies_member`).
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
    copied_templates: bool = True
    copied_members: bool = True
    tokenize: Callable[[str], Sequence[Hashable]] = str.split
    problems: Sequence[Problem] = ()

    def too_long(self, edit: Edit) -> TypeGuard[Add | Modify | Merge]:
        """Whether an edit's principle has more than `max_words` words, or as many characters as long words
        would have, since not all languages put spaces between words. Prose has no such limit."""
        principle = getattr(edit, "principle", "")
        return len(principle.split()) > self.max_words or len(principle) > LONGEST_WORD * self.max_words

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

    def copies(self, text: str, problems: Sequence[Problem] = ()) -> bool:
        """Whether a text has a run of a training problem, or of these problems where there are none."""
        runs = self.training_runs if self.problems else runs_of(problems, self.tokenize, self.copied_tokens)
        return _holds_run(_tokens(text, self.tokenize), runs)


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
    its answer is given away by the same words. An answer of one or two characters, or a word such as "no",
    stands in many a sentence for another reason; it counts only after "answer", "is" and the like.

    Args:
      edits: to be checked.
      problems: of the iteration.
      guards: with the training problems.
    """
    numbers, answers = [], set()
    if guards.copied_tokens:
        numbers = [_long_numbers(words(problem.text)) for problem in problems]
    if guards.copied_answers:
        right = [answer for problem in problems for answer in (problem.answer, *problem.aliases)]
        answers = set(map(plain_answer, right)) - {()}

    def why(edit: Edit) -> str:
        text = said_by(edit)
        said = {*words(text)}
        if guards.copies(text, problems) or any(each <= said for each in numbers):
            return "copies_problem"
        return "copies_answer" if any(_gives_away(plain_answer(text), each) for each in answers) else ""

    reasons = [why(edit) for edit in edits]
    return (
        tuple(edit for edit, reason in zip(edits, reasons, strict=True) if not reason),
        tuple((reason, describe(edit)) for edit, reason in zip(edits, reasons, strict=True) if reason),
    )


def drop_too_long(edits: Sequence[Edit], guards: Guards) -> Checked:
    """Keeps the edits whose principle has at most `max_words` words."""
    return partition(edits, "too_long", lambda edit: not guards.too_long(edit))


def drop_echoes(edits: Sequence[Edit], told: Sequence[str], guards: Guards) -> Checked:
    """Keeps the edits that do not echo what the reflector was told.

    Args:
      edits: to be checked.
      told: texts of the templates.
      guards: whether they are checked.
    """
    if not guards.copied_templates:
        return tuple(edits), ()
    texts = [" ".join(words(text)) for text in told]

    def is_own(edit: Edit) -> bool:
        said = words(said_by(edit))
        size = min(ECHOED_WORDS, len(said))
        runs = [" ".join(said[i : i + size]) for i in range(len(said) - size + 1)] if size > 2 else []
        return not any(f" {run} " in f" {text} " for run in runs for text in texts)

    return partition(edits, "copies_template", is_own)


def drop_members(edits: Sequence[Edit], others: Sequence[SystemPrompt], guards: Guards) -> Checked:
    """Keeps the edits whose principle no other member has. Case and punctuation make no difference."""
    had = {words(principle) for other in others for principle in other.principles}
    return partition(
        edits,
        "copies_member",
        lambda edit: not guards.copied_members or words(said_by(edit)) not in had - {()},
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

    A problem stands for all its runs of `length` tokens or, if it has fewer but at least four, for itself. A
    run of more than `SHARED_BY` problems is how such problems are worded, and stands for none of them.
    """
    counts: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for problem in problems if length else ():
        tokens = _tokens(problem.text, tokenize)
        size = min(length, len(tokens))
        if size >= min(4, length):
            counts[size].update({hash(tokens[i : i + size]) for i in range(len(tokens) - size + 1)})
    return {
        size: {run for run, times in counter.items() if times <= SHARED_BY}
        for size, counter in counts.items()
    }


def _tokens(text: str, tokenize: Callable[[str], Sequence[Hashable]]) -> tuple[Hashable, ...]:
    # With a space before it, the first word has the tokens that it has inside a text.
    return tuple(tokenize(" " + " ".join(words(text))))


def plain_answer(text: str) -> tuple[str, ...]:
    """The words and numbers of an answer, or of a text that may hold it, without LaTeX's commands."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return tuple(word for word in words(text) if word not in _LATEX)


def words(text: str) -> tuple[str, ...]:
    """The words and numbers of a text in lower case."""
    return tuple(re.findall(r"\w+", text.lower()))


def said_by(edit: Edit) -> str:
    """What an edit brings into the prompt."""
    return edit.replace if isinstance(edit, Replace) else getattr(edit, "principle", "")


def _holds_run(tokens: Sequence[Hashable], runs: Mapping[int, set[int]]) -> bool:
    return any(
        hash(tuple(tokens[i : i + size])) in hashes
        for size, hashes in runs.items()
        for i in range(len(tokens) - size + 1)
    )


def _gives_away(said: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    places = [i for i in range(len(said) - len(answer) + 1) if said[i : i + len(answer)] == answer]
    if len(answer) == 1 and (len(answer[0]) < 3 or answer[0] in _COMMON_ANSWERS):
        return any(i and said[i - 1] in _BEFORE_ANSWERS for i in places)
    return bool(places)


def _long_numbers(text: tuple[str, ...]) -> set[str]:
    """A problem's numbers of two digits or more; a set that nothing contains if there are fewer than two."""
    numbers = {word for word in text if word.isdigit() and len(word) > 1}
    return numbers if len(numbers) > 1 else {""}
