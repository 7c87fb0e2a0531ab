"""How good prompts are on problems nobody trained on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from espl_jax.metrics import interval
from espl_jax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One prompt on one problem set.

    Attributes:
      reward: mean over problems and samples.
      accuracy: share of successes, pass@1.
      low, high: 95% interval of the accuracy over problems: Wilson's with one sample a problem, or where all
        problems have the same mean; else the normal one of the problems' means, since samples of one problem
        are not independent.
      pass_at: k -> unbiased pass@k, for k = 1, 2, 4, ... up to the samples a problem.
      num_problems, num_samples: how many problems, how many samples of each.
    """

    reward: float
    accuracy: float
    low: float
    high: float
    pass_at: dict[str, float]
    num_problems: int
    num_samples: int

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """Chance that one of k samples succeeds, unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
      successes: among `samples` drawn.
      samples: at least k.
      k: at least 1.
    """
    if not 1 <= k <= samples or not 0 <= successes <= samples:
        raise ValueError(
            f"k={k}, samples={samples}, successes={successes}: need 1 <= k <= samples >= successes >= 0"
        )
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def summarize(rollouts: Rollouts) -> list[Evaluation]:
    """One Evaluation for each slot of the rollouts, in order."""
    problems, samples = rollouts.rewards.shape[1:]
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    evaluations = []
    for rewards, success in zip(rollouts.rewards, rollouts.success, strict=True):
        counts = success.sum(axis=1)
        accuracy = float(success.mean())
        deviation = float(np.std(success.mean(axis=1), ddof=1)) if problems > 1 else 0.0
        if samples == 1 or deviation == 0:
            low, high = interval(round(accuracy * problems), problems)
        else:
            half = 1.96 * deviation / math.sqrt(problems)
            low, high = max(0.0, accuracy - half), min(1.0, accuracy + half)
        pass_at = {str(k): float(np.mean([pass_at_k(int(c), samples, k) for c in counts])) for k in ks}
        reward = float(rewards.mean(dtype=np.float64))
        evaluations.append(Evaluation(reward, accuracy, low, high, pass_at, problems, samples))
    return evaluations
