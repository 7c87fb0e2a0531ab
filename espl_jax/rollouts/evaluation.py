"""How good prompts are on problems nobody trained on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from espl_jax.console.tables import percent
from espl_jax.rollouts import intervals
from espl_jax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One prompt on one problem set. Every interval is a 95% interval over problems (see `intervals`).

    Attributes:
      reward: mean over problems and samples.
      accuracy: share of successes, pass@1.
      low, high: interval of the accuracy.
      pass_at: k -> unbiased pass@k, for k = 1, 2, 4, ... up to the samples a problem.
      num_problems, num_samples: how many problems, how many samples of each.
      reward_interval: (low, high); None for a single problem with rewards outside 0 .. 1, whose spread
        nothing is known of.
      pass_at_interval: k -> (low, high).
    """

    reward: float
    accuracy: float
    low: float
    high: float
    pass_at: dict[str, float]
    num_problems: int
    num_samples: int
    reward_interval: tuple[float, float] | None
    pass_at_interval: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        return percent(self.accuracy, self.low, self.high)


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
    return [estimate(*grades) for grades in zip(rollouts.rewards, rollouts.success, strict=True)]


def estimate(rewards: np.ndarray, success: np.ndarray) -> Evaluation:
    """What the grades of one prompt say of it.

    Args:
      rewards: float [B, N], of N samples of each problem.
      success: bool [B, N].
    """
    problems, samples = success.shape
    counts = success.sum(axis=1).tolist()
    pass_at, pass_at_interval = {}, {}
    for k in (2**i for i in range(samples.bit_length())):
        values = np.array([pass_at_k(count, samples, k) for count in counts])
        pass_at[str(k)] = float(values.mean())
        pass_at_interval[str(k)] = intervals.of_share(values, problems * samples / k)
    means = rewards.mean(axis=1, dtype=np.float64)
    bounded = rewards.min() >= 0 and rewards.max() <= 1
    low, high = pass_at_interval["1"]
    return Evaluation(
        reward=float(means.mean()),
        accuracy=pass_at["1"],
        low=low,
        high=high,
        pass_at=pass_at,
        num_problems=problems,
        num_samples=samples,
        reward_interval=intervals.of_share(means, problems * samples)
        if bounded
        else intervals.of_mean(means),
        pass_at_interval=pass_at_interval,
    )
