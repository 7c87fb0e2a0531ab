"""95% intervals of means over problems.

Problems are the independent draws: samples of one problem are alike, so that ten of each are worth less than
ten times as many problems (Miller 2024, arXiv 2411.00640, section 2.2). The usual interval, the mean give or
take its standard error over problems, is far too narrow where most problems give 0 (or 1), which is where
models are evaluated: at 5% and 30 problems it holds the truth three times in four. So what is bounded gets
Wilson's interval for as many independent trials as the problems are worth by the spread among them, and
Student's quantile, since that spread is itself an estimate (the effective sample size of Korn and Graubard
1998, Survey Methodology 24).
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from scipy.special import stdtrit

from espl_jax.console.tables import percent


def of_share(values: np.ndarray, most_trials: float) -> tuple[float, float]:
    """The interval of a mean of values between 0 and 1. With only zeros and ones it is Wilson's.

    Args:
      values: float [B], one of each problem: a share of successes, pass@k, a reward.
      most_trials: what the problems are worth at most, B times the independent trials in one value.

    Raises:
      ValueError: if a value is not between 0 and 1.
    """
    values = np.asarray(values, np.float64)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"values from {values.min():g} to {values.max():g}: a share is between 0 and 1")
    # Not 1 - mean, which may be 0 for values just below 1.
    problems, mean, rest = len(values), float(values.mean()), float((1 - values).mean())
    if problems == 1 or np.isin(values, (0, 1)).all():
        return interval(values.sum(), problems)
    variance = float(values.var(ddof=1))
    worth = problems * mean * rest / variance if variance else math.inf
    # The variance of values in [0, 1] is at most that of zeros and ones: less is rounding.
    trials = min(max(worth, problems - 1), most_trials)
    return interval(mean * trials, trials, _student(problems))


def of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """Student's interval of a mean of values without bounds, float [B]; None for one value alone."""
    if len(values) == 1:
        return None
    half = _student(len(values)) * float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(len(values))
    mean = float(np.mean(values, dtype=np.float64))
    return mean - half, mean + half


def _student(problems: int) -> float:
    return float(stdtrit(problems - 1, 0.975))


Z95 = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a mean within which 95% of a normal distribution lie."""


def interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """The 95% confidence interval of a proportion (Wilson 1927), also right near 0 and 1 and for small n.

    Args:
      successes: how many of `n` independent trials succeeded.
      n: trials; with `successes` it may be fractional, where trials are not independent and count for fewer.
      z: standard errors on either side.

    Raises:
      ValueError: n is less than 1, or successes are not among 0 .. n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: an interval needs n >= 1 and 0 <= successes <= n")
    center = (successes + z**2 / 2) / (n + z**2)
    half_width = z / (n + z**2) * (successes * (n - successes) / n + z**2 / 4) ** 0.5
    return max(0.0, center - half_width), min(1.0, center + half_width)


def proportion(successes: int, n: int) -> str:
    """A proportion and its 95% interval as text: `80.0% [49.0, 94.3]`."""
    return percent(successes / n, *interval(successes, n))
