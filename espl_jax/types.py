"""The types that pass between host code and device code.

Host code (prompts, ratings, rewards) and device code (params, gradients) never import each other. Both
import this module, which needs only numpy. Dimensions: M system prompts, B problems, N rollouts per (prompt,
problem) pair, T new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

Message = dict[str, Any]
"""One chat message, `{"role": "system" | "user" | "assistant" | "tool", "content": str}`."""

Conversation = list[Message]
"""Messages in order. If the last message is from the assistant, the reply must continue it (an opening)."""

Schema = dict[str, Any]
"""A JSON schema as plain values."""

Grammar = Schema | str
"""What a reply is kept to: a JSON schema, or a grammar in llguidance's Lark."""

Reflect = Callable[[Sequence[Conversation]], Sequence[str | None]]
"""Conversations -> one reply each, in order; None if there is no reply (e.g. a server failed).

A reply includes the opening, if one was given. The same conversation gets a new reply each time. A reflector
may also be an `Answerer` or a `CountsRequests`.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a reflector.

    Attributes:
      conversation: what to reply to. Without reasoning its last message may be an opening.
      grammar: constrains the reply; None for free text.
      reasoning: `none`; `brief`, free text in a turn of its own, followed by `request`; or `model`, the
        model's thinking block.
      request: the user turn that asks for the reply after brief reasoning.
    """

    conversation: Conversation
    grammar: Grammar | None = None
    reasoning: str = "none"
    request: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a `Question`.

    Attributes:
      text: the reply, without its reasoning; empty if the reasoning was cut off.
      reasoning: the reasoning before it, as far as the reflector returns it.
      ended: whether reasoning and reply ended by themselves, and not at a limit.
    """

    text: str
    reasoning: str = ""
    ended: bool = True


class Answerer(Protocol):
    """A reflector that can reason first, follow a grammar, and tell whether a reply was cut off."""

    def ask(self, questions: Sequence[Question]) -> list[Reply | None]:
        """Returns one reply per question, in order; None if there is no reply."""
        ...


class CountsRequests(Protocol):
    """A reflector that counts its requests, retries, tokens and costs.

    Attributes:
      counts: counts by name, for this object.
    """

    counts: dict[str, float]


def is_answerer(reflect: Any) -> TypeGuard[Answerer]:
    """Returns whether a reflector has a method `ask`."""
    return callable(getattr(reflect, "ask", None))


def counts_of(reflect: Any) -> dict[str, float]:
    """Returns the counts of a `CountsRequests`; empty for other reflectors."""
    return getattr(reflect, "counts", {})


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      id: stable name, unique in its problem set; random keys are derived from it.
      text: the statement, as in the user turn.
      answer: the gold answer, for the grader and the reflector; the policy never sees it.
      aliases: other answers that are also correct.
    """

    id: str
    text: str
    answer: str
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Passage:
    """A search result.

    Attributes:
      title: title of its page; may be empty.
      text: text of the passage.
    """

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class SystemPrompt:
    """A system prompt with its rating and lineage; a member of the population.

    Attributes:
      id: unique in a run (`p0`, `p1`, ...), never reused; empty for a child that is not in a population yet.
      text: prose before the principles; may be empty.
      principles: numbered G0, G1, ... by position.
      mu, sigma: mean and standard deviation of the rating (initially 25 and 25/3).
      parents: ids of the parents; empty for a root.
      operator: `root`, `mutation` or `crossover`.
      iteration: the iteration that created it.
      edits: the edits that created it, in the order applied, as plain dicts.
      evidence: inputs of the operator (problems won, suggestions), as plain JSON values.
      tournaments: its rated tournaments, oldest first: `{"iteration", "value", "rank", "players", "mu",
        "sigma"}`, with ranks from 0 and the rating after the tournament.
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
        """Returns the content of the system turn; empty means that there is no system turn."""
        numbered = "\n".join(f"G{i}. {principle}" for i, principle in enumerate(self.principles))
        return "\n\n".join(part for part in (self.text, numbered) if part)


@dataclasses.dataclass(frozen=True)
class Grade:
    """The grade of one reply.

    Attributes:
      reward: reward for the gradient and the ratings; any finite number.
      success: whether the reply counts as correct for pass@k and accuracy.
      answer: the answer that the grader extracted, or None.
      metrics: other metrics of the reply, for reports; missing names count as 0.
      feedback: what the environment knows about the reply, in words, for reflection ("There is no answer in a
        box."); may be empty. It must not name the gold answer.
    """

    reward: float
    success: bool
    answer: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    feedback: str = ""


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """The rollouts of an iteration, the input of both the update and evolution.

    A prompt may fill several of the M slots (copies, early in a run). Code that compares prompts uses
    `prompts[i].id`, so that copies are pooled.

    Attributes:
      prompts: the system prompts, one per slot, [M].
      problems: the problems, [B].
      system_tokens: tokens of the prefix shared by all conversations of a slot, M lists.
      problem_tokens: the rest of each prompt up to the model's turn, M lists of B non-empty lists.
      tokens: int32 [M, B, N, T], new tokens, right-padded with zeros.
      lengths: int32 [M, B, N], tokens of each rollout after its prompt: sampled tokens, including the stop
        token, and tokens appended to the conversation, e.g. tool output.
      drawn: bool [M, B, N, T], True for sampled tokens, False for appended tokens and padding.
      logprobs: float32 [M, B, N, T], under the sampling distribution; zero for tokens that were not sampled.
      untruncated_logprobs: float32 [M, B, N, T], under softmax(logits / temperature).
      cutoffs: float32 [M, B, N, T], untruncated logprob below which truncated sampling excluded tokens; -inf
        without truncation.
      temperature: sampling temperature; 0 for greedy.
      truncated: bool [M, B, N], True if a limit (new tokens or context) ended the rollout.
      replies: text of each rollout without thinking blocks, [M][B][N]; for several turns the text of all
        turns, including what was appended between them.
      answers: the answer that the grader extracted, or None, [M][B][N].
      rewards: float32 [M, B, N].
      success: bool [M, B, N].
      metrics: name -> float32 [M, B, N], other metrics of the grader.
      feedback: [M][B][N], feedback on each rollout, or () if no environment gave any.
      routing: int16 [M, B, N, T, L, A], experts that the sampler chose in each of L layers with experts when
        it drew a token, for the token before it; -1 for tokens that it did not draw. None if not recorded.
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
    feedback: tuple[tuple[tuple[str, ...], ...], ...] = ()
    routing: np.ndarray | None = None

    def feedback_on(self, i: int, b: int, j: int) -> str:
        """What the environment said about one rollout."""
        return self.feedback[i][b][j] if self.feedback else ""

    def slots(self) -> dict[str, list[int]]:
        """Returns the slots of each distinct prompt: id -> indices on the M axis, in order of selection."""
        slots: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            slots.setdefault(prompt.id, []).append(i)
        return slots

    def distinct(self) -> list[SystemPrompt]:
        """Returns the distinct prompts, in order of selection."""
        return [self.prompts[slots[0]] for slots in self.slots().values()]

    def score_matrix(self) -> np.ndarray:
        """Returns Phi, float64 [distinct prompts, B]: mean reward per prompt and problem, copies pooled."""
        rewards = self.rewards.astype(np.float64)
        return np.stack([rewards[slots].mean(axis=(0, 2)) for slots in self.slots().values()])


class TrainBatch(NamedTuple):
    """The right-padded prefix tree of one update, as numpy or jax arrays.

    System prompts are replicated. Problems and rollouts are in D equal shards, one per group of devices that
    shares rows (D = 1 on a single device). The problem of a rollout is in the same shard, so a problem whose
    group is split across shards is in several. Padding consists of rollouts with an empty mask and problems
    without rollouts. The inputs of a rollout begin with the last token of its problem, so that column t of
    `inputs` predicts column t of `targets`.

    Attributes:
      system_tokens: int32 [M, S]; system_lengths: int32 [M]. S = 0 for a tree without this level.
      problem_tokens: int32 [D, P, Q]; problem_lengths: int32 [D, P], without the last token of the prompt.
        Q = 0 for a tree without this level.
      problem_system: int32 [D, P], index of the system prompt of each problem.
      rollout_problem: int32 [D, R], index of the problem of each rollout within the shard.
      inputs: int32 [D, R, T]; targets: int32 [D, R, T].
      mask: bool [D, R, T], True if the policy sampled the target.
      sampler_logprobs: float32 [D, R, T], under the sampling distribution.
      cutoffs: float32 [D, R, T], see `Rollouts`; None without truncation.
      advantages: float32 [D, R].
      num_rollouts: float32 [], number of rollouts including those left out of the batch: the NMB in the
        paper's 1/(NMB).
      num_tokens: float32 [], number of tokens that the policy sampled in these rollouts.
      old_logprobs: float32 [D, R, T], under the params before the first of several updates; None for a single
        update, and for losses that do not need them.
      routing: int16 [D, R, T, L, A], experts that the sampler chose for each input, see `Rollouts`; None if
        not recorded.
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
    routing: Any | None = None
