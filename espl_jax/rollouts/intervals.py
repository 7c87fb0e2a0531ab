"""95% confidence intervals of means over problems, and over seeds.

Problems are the independent units: samples of the same problem are correlated, so ten samples per problem are
worth less than ten times the problems (Miller 2024, arXiv 2411.00640, section 2.2). The usual interval, the
mean plus or minus 1.96 standard errors over problems, is far too narrow when most problems score 0 (or 1),
which is common in evaluation: with an accuracy of 5% and 30 problems, its coverage is about 75%. Bounded
values therefore get Wilson's interval with an effective number of independent trials, estimated from the
variance between problems, and with Student's quantile, because that variance is an estimate itself (Korn and
Graubard 1998, Survey Methodology 24).

Seeds and problems are crossed where several seeds meet the same problems: the variance of the mean is that
over seeds plus that over problems, with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2). On
simulated differences with 3 to 10 seeds, these intervals hold the truth in 93 to 98% of cases. A percentile
bootstrap over seeds and problems holds it in 80 to 87% for 3 or 5 seeds that differ a lot.
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from scipy.special import stdtrit

from espl_jax.console.tables import percent


def of_share(values: np.ndarray, most_trials: float) -> tuple[float, float]:
    """Returns the interval of a mean of values in [0, 1]; for zeros and ones of one seed it is Wilson's.

    Args:
      values: float [B], one per problem: a success rate, pass@k or a reward; or float [S, B], of S seeds on
        the same problems.
      most_trials: upper bound of the effective number of trials: the number of values times the independent
        trials per value.

    Raises:
      ValueError: if a value is not in [0, 1].
    """
    values = np.asarray(values, np.float64)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"values from {values.min():g} to {values.max():g}: shares must be between 0 and 1")
    if values.ndim == 2 and (values == values.flat[0]).all():
        values = values[0]  # seeds that do not differ are worth one
    values = _independent(values)
    # Not 1 - mean, which may round to 0 for values just below 1.
    units, mean, rest = min(values.shape), float(values.mean()), float((1 - values).mean())
    if units == 1 or (values.ndim == 1 and np.isin(values, (0, 1)).all()):
        return interval(values.sum(), units)
    variance, freedom = _of_the_mean(values)
    worth = mean * rest / variance if variance else math.inf
    # The variance of values in [0, 1] is at most that of zeros and ones; a smaller `worth` is rounding error.
    trials = min(max(worth, units - 1), most_trials)
    return interval(mean * trials, trials, float(stdtrit(freedom, 0.975)))


def of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """Returns Student's t interval of a mean of unbounded values; None for a single value.

    Args:
      values: float [B], one per problem, or [S, B], of S seeds on the same problems.
    """
    values = _independent(np.asarray(values, np.float64))
    if values.size == 1:
        return None
    variance, freedom = _of_the_mean(values)
    half, mean = float(stdtrit(freedom, 0.975)) * math.sqrt(variance), float(values.mean())
    return mean - half, mean + half


def difference(paired: np.ndarray) -> str:
    """Formats a mean difference of success rates and its 95% interval: `+12.0 points [+5.0, +19.0]`.

    Args:
      paired: float [S, B], differences of the same seeds on the same problems.
    """
    mean, ends = f"{100 * float(paired.mean()):+.1f} points", of_mean(paired)
    if ends is None or not np.ptp(paired):
        return f"{mean} (no interval: all problems have the same difference)"
    low, high = np.clip(ends, -1, 1)  # as far as success rates can differ
    return f"{mean} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _independent(values: np.ndarray) -> np.ndarray:
    """Leaves out a dimension of a single seed or of a single problem, over which nothing varies."""
    return values.reshape(-1) if 1 in values.shape else values


def _of_the_mean(values: np.ndarray) -> tuple[float, float]:
    """Returns the variance of the mean of values [B] or [S, B], and its degrees of freedom; S, B > 1."""
    if values.ndim == 1:
        return float(values.var(ddof=1)) / len(values), len(values) - 1
    seeds, problems = values.shape
    of_seeds, of_problems = values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seeds[:, None] - of_problems + values.mean()
    freedom = np.array([seeds - 1, problems - 1, (seeds - 1) * (problems - 1)])
    # Variances of the mean over seeds and over problems; both hold that of single values.
    parts = np.array([of_seeds.var(ddof=1) / seeds, of_problems.var(ddof=1) / problems, 0.0])
    parts[2] = np.square(rest).sum() / freedom[2] / values.size
    total = parts[0] + parts[1] - parts[2]
    if total <= max(parts[:2]):  # seeds or problems do not differ beyond their single values
        larger = int(parts[1] >= parts[0])
        return float(parts[larger]), float(freedom[larger])
    return float(total), float(total**2 / (parts**2 / freedom).sum())


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
