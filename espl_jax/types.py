"""The records that pass between the two worlds, and nothing else.

Host code (prompts, ratings, rewards) and device code (params, gradients) never import each other; both
import this module, which needs numpy alone. Letters: M system prompts, B problems, N rollouts of each
(prompt, problem) pair, T new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

Message = dict[str, Any]
"""One chat message, `{"role": "system" | "user" | "assistant" | "tool", "content": str}`."""

Conversation = list[Message]
"""Messages in order. A last message of the assistant's is an opening that the reply must continue."""

Schema = dict[str, Any]
"""A JSON schema as plain values."""

Reflect = Callable[[Sequence[Conversation]], Sequence[str | None]]
"""Conversations in, one reply each out, in order; None where no reply was to be had (a server that fails).

A reply includes the opening, if one was given. The same conversation asked again gets another reply. A
reflector may also be a `KeepsSchemas` or a `CountsRequests`.
"""


class KeepsSchemas(Protocol):
    """A reflector that can keep its replies to JSON schemas."""

    def constrained(
        self, conversations: Sequence[Conversation], schemas: Sequence[Schema]
    ) -> Sequence[str | None]:
        """One reply each, in order, kept to the schema of its conversation as far as the reflector can."""
        ...


class CountsRequests(Protocol):
    """A reflector that counts what it asked for: requests, retries, tokens, costs.

    Attributes:
      counts: numbers by name, of this object.
    """

    counts: dict[str, float]


def keeps_schemas(reflect: Any) -> TypeGuard[KeepsSchemas]:
    """Whether a reflector has a method `constrained`."""
    return callable(getattr(reflect, "constrained", None))


def counts_of(reflect: Any) -> dict[str, float]:
    """What a `CountsRequests` counted; nothing for other reflectors."""
    return getattr(reflect, "counts", {})


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      id: stable name, unique in its problem set; random keys are folded from it.
      text: the statement as the user turn gives it.
      answer: the gold answer, for the grader and for reflection, never for the policy.
      aliases: other answers that are as right.
    """

    id: str
    text: str
    answer: str
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Passage:
    """What a search finds.

    Attributes:
      title: of the page that it is from; may be empty.
      text: the passage itself.
    """

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class SystemPrompt:
    """One member of the population: what is said to the model, how good it is believed to be, whence it came.

    Attributes:
      id: unique in a run (`p0`, `p1`, ...), never given twice; empty for a child not yet in a population.
      text: prose that comes before the principles; may be empty.
      principles: numbered G0, G1, ... by their place in this tuple.
      mu, sigma: mean and standard deviation of the rating (25 and 25/3 at first).
      parents: ids of the parents; empty for a root.
      operator: `root`, `mutation` or `crossover`.
      iteration: the iteration that made it.
      edits: the edits that made it, in the order applied, as plain dicts.
      evidence: what the operator went by (problems won, suggestions), as plain JSON values.
      tournaments: those it was rated in, oldest first: `{"iteration", "value", "rank", "players", "mu",
        "sigma"}`, the rank counted from 0 and the rating the one after it.
    """

    text: str = ""
    principles: tuple[str, ...] = ()
    id: str = ""
    mu: float = 25.0
    sigma: float = 25.0 / 3.0
    parents: tuple[str, ...] = ()
    operator: str = "root"
    iteration: int = 0
    edits: tuple[dict[str, Any], ...] = ()
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    tournaments: tuple[dict[str, Any], ...] = ()

    def render(self) -> str:
        """The system turn's content; empty means that there is no system turn at all."""
        numbered = "\n".join(f"G{i}. {principle}" for i, principle in enumerate(self.principles))
        return "\n\n".join(part for part in (self.text, numbered) if part)


@dataclasses.dataclass(frozen=True)
class Grade:
    """What an environment says of one reply.

    Attributes:
      reward: what the gradient and the ratings see; any finite number.
      success: whether it counts for pass@k and accuracy.
      answer: the answer as the grader read it, or None where it found none.
      metrics: other numbers about the reply, for reports; 0 where a name is missing.
    """

    reward: float
    success: bool
    answer: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """One iteration's rollouts: the single thing handed from sampling to both branches.

    A prompt may fill several of the M slots (copies, early in a run); whatever compares prompts goes by
    `prompts[i].id`, so that copies are pooled.

    Attributes:
      prompts: the system prompts, one a slot, [M].
      problems: the problems, [B].
      system_tokens: tokens of the shared start of every conversation of a slot, M lists.
      problem_tokens: the rest of each prompt up to the model's turn, M lists of B lists, each at least one.
      tokens: int32 [M, B, N, T], the new tokens, right padded with zeros.
      lengths: int32 [M, B, N], tokens of each rollout after its prompt: those the model drew (the stop token
        included) and those appended to the conversation, e.g. a tool's answers.
      drawn: bool [M, B, N, T], True for tokens that the model drew; False for appended ones and padding.
      logprobs: float32 [M, B, N, T], under the distribution drawn from; zero where nothing was drawn.
      untruncated_logprobs: float32 [M, B, N, T], under softmax(logits / temperature).
      cutoffs: float32 [M, B, N, T], the untruncated logprob below which truncated sampling drew nothing; -inf
        where nothing was cut.
      temperature: of sampling; 0 for greedy.
      truncated: bool [M, B, N], ended by a limit (of new tokens or of the context) and not by itself.
      replies: text of each rollout without its thinking blocks, [M][B][N]; of a conversation of several turns
        all of them, with what was said between them.
      answers: the answer that the grader read, or None, [M][B][N].
      rewards: float32 [M, B, N].
      success: bool [M, B, N].
      metrics: name -> float32 [M, B, N], other numbers of the grader's.
    """

    prompts: tuple[SystemPrompt, ...]
    problems: tuple[Problem, ...]
    system_tokens: tuple[tuple[int, ...], ...]
    problem_tokens: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: np.ndarray
    lengths: np.ndarray
    drawn: np.ndarray
    logprobs: np.ndarray
    untruncated_logprobs: np.ndarray
    cutoffs: np.ndarray
    temperature: float
    truncated: np.ndarray
    replies: tuple[tuple[tuple[str, ...], ...], ...]
    answers: tuple[tuple[tuple[str | None, ...], ...], ...]
    rewards: np.ndarray
    success: np.ndarray
    metrics: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def slots(self) -> dict[str, list[int]]:
        """Slots of each distinct prompt: id -> indices on the M axis, in order of selection."""
        slots: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            slots.setdefault(prompt.id, []).append(i)
        return slots

    def distinct(self) -> list[SystemPrompt]:
        """The distinct prompts, in order of selection."""
        return [self.prompts[slots[0]] for slots in self.slots().values()]

    def score_matrix(self) -> np.ndarray:
        """Phi: float64 [distinct prompts, B], each prompt's mean reward on each problem, copies pooled."""
        rewards = self.rewards.astype(np.float64)
        return np.stack([rewards[slots].mean(axis=(0, 2)) for slots in self.slots().values()])


class TrainBatch(NamedTuple):
    """The prefix tree of one update, right padded. Arrays of numpy or jax.

    System prompts are on every device. Problems and rollouts lie in D equal shards, one for each group of
    devices that shares rows (one on a single device); each rollout's problem is in its shard, so a problem
    whose group is split is in several. Padding is rollouts with an empty mask, and problems that nobody has.
    A rollout's inputs begin with the last token of its problem, so that column t of `inputs` predicts column
    t of `targets`.

    Attributes:
      system_tokens: int32 [M, S]; system_lengths: int32 [M]. S = 0 for a tree without this level.
      problem_tokens: int32 [D, P, Q]; problem_lengths: int32 [D, P] (the last token of the prompt left out).
        Q = 0 for a tree without this level.
      problem_system: int32 [D, P], the system prompt of each problem.
      rollout_problem: int32 [D, R], the problem of each rollout, counted within the shard.
      inputs: int32 [D, R, T]; targets: int32 [D, R, T].
      mask: bool [D, R, T], True where a target was drawn by the policy.
      sampler_logprobs: float32 [D, R, T], under the distribution drawn from.
      cutoffs: float32 [D, R, T], see `Rollouts`; None where nothing was cut.
      advantages: float32 [D, R].
      num_rollouts: float32 [], rollouts that the update stands for, those left out included: the 1/(NMB) of
        the paper.
      num_tokens: float32 [], tokens that the policy drew in them.
      old_logprobs: float32 [D, R, T], under the params before the first update of several; None for a single
        one, and for a loss that does not need them.
    """

    system_tokens: Any
    system_lengths: Any
    problem_tokens: Any
    problem_lengths: Any
    problem_system: Any
    rollout_problem: Any
    inputs: Any
    targets: Any
    mask: Any
    sampler_logprobs: Any
    cutoffs: Any | None
    advantages: Any
    num_rollouts: Any
    num_tokens: Any
    old_logprobs: Any | None = None
