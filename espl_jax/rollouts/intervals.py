"""95% confidence intervals of means over problems.

Problems are the independent units: samples of the same problem are correlated, so ten samples per problem are
worth less than ten times the problems (Miller 2024, arXiv 2411.00640, section 2.2). The usual interval, the
mean plus or minus 1.96 standard errors over problems, is far too narrow when most problems score 0 (or 1),
which is common in evaluation: with an accuracy of 5% and 30 problems, its coverage is about 75%. Bounded
values therefore get Wilson's interval with an effective number of independent trials, estimated from the
variance between problems, and with Student's quantile, because that variance is an estimate itself (Korn and
Graubard 1998, Survey Methodology 24).
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from scipy.special import stdtrit

from espl_jax.console.tables import percent


def of_share(values: np.ndarray, most_trials: float) -> tuple[float, float]:
    """Returns the interval of a mean of values in [0, 1]; for zeros and ones it is Wilson's.

    Args:
      values: float [B], one per problem: a success rate, pass@k or a reward.
      most_trials: upper bound of the effective number of trials: B times the independent trials per value.

    Raises:
      ValueError: if a value is not in [0, 1].
    """
    values = np.asarray(values, np.float64)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"values from {values.min():g} to {values.max():g}: shares must be between 0 and 1")
    # Not 1 - mean, which may round to 0 for values just below 1.
    problems, mean, rest = len(values), float(values.mean()), float((1 - values).mean())
    if problems == 1 or np.isin(values, (0, 1)).all():
        return interval(values.sum(), problems)
    variance = float(values.var(ddof=1))
    worth = problems * mean * rest / variance if variance else math.inf
    # The variance of values in [0, 1] is at most that of zeros and ones; a smaller `worth` is rounding error.
    trials = min(max(worth, problems - 1), most_trials)
    return interval(mean * trials, trials, _student(problems))


def of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """Returns Student's t interval of a mean of unbounded values, float [B]; None for a single value."""
    if len(values) == 1:
        return None
    half = _student(len(values)) * float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(len(values))
    mean = float(np.mean(values, dtype=np.float64))
    return mean - half, mean + half


def _student(problems: int) -> float:
    return float(stdtrit(problems - 1, 0.975))


Z95 = statistics.NormalDist().inv_cdf(0.975)
"""Two-sided 95% quantile of the standard normal distribution."""


def interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Returns Wilson's interval of a proportion (Wilson 1927): accurate near 0 and 1, and for small n.

    Args:
      successes: number of successes.
      n: number of independent trials. Both may be fractional, to represent an effective number of trials.
      z: standard errors on either side; 95% by default.

    Raises:
      ValueError: if n is less than 1, or successes are not in [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: an interval needs n >= 1 and 0 <= successes <= n")
    center = (successes + z**2 / 2) / (n + z**2)
    half_width = z / (n + z**2) * (successes * (n - successes) / n + z**2 / 4) ** 0.5
    return max(0.0, center - half_width), min(1.0, center + half_width)


def proportion(successes: int, n: int) -> str:
    """Formats a proportion and its 95% interval: `80.0% [49.0, 94.3]`."""
    return percent(successes / n, *interval(successes, n))
