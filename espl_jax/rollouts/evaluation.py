"""Statistics of prompts on a problem set: mean reward, accuracy and pass@k, with confidence intervals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from espl_jax.console.tables import percent
from espl_jax.rollouts import intervals
from espl_jax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one prompt on one problem set. All intervals are 95% intervals over problems (`intervals`).

    Attributes:
      reward: mean over problems and samples.
      accuracy: fraction of successes, which is pass@1.
      low, high: interval of the accuracy.
      pass_at: k -> unbiased pass@k, for k = 1, 2, 4, ... up to the samples per problem.
      num_problems: number of problems.
      num_samples: samples per problem.
      reward_interval: (low, high); None for a single problem with rewards outside 0 .. 1, whose spread is
        unknown.
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
    """Returns the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
      successes: successful samples.
      samples: samples in total, at least k.
      k: at least 1.

    Raises:
      ValueError: if an argument is out of range.
    """
    if not 1 <= k <= samples or not 0 <= successes <= samples:
        raise ValueError(
            f"k={k}, samples={samples}, successes={successes}: need 1 <= k <= samples >= successes >= 0"
        )
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def summarize(rollouts: Rollouts) -> list[Evaluation]:
    """Returns one Evaluation per entry of `rollouts.prompts`, in order."""
    return [estimate(*grades) for grades in zip(rollouts.rewards, rollouts.success, strict=True)]


def estimate(rewards: np.ndarray, success: np.ndarray) -> Evaluation:
    """Computes the Evaluation of one prompt from its grades.

    Args:
      rewards: float [B, N], rewards of N samples of each problem.
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
