"""Intervals and tests for one exam taken twice: is the difference more than luck?"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    groups: Sequence[str],
    weights: Sequence[float] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of weighted mean(second) - weighted mean(first), resampling whole groups.

    Args:
        first, second: scores of the same items, in the same order.
        groups: items of one group (questions on one case) are drawn together, as their errors go together.
        weights: 1 for a rate of questions; the possible points for a rate of points.

    Method: Efron & Tibshirani 1993, chapter 13 (percentile interval), over clusters.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    w = np.ones_like(a) if weights is None else np.asarray(weights, dtype=float)
    if not len(a) == len(b) == len(groups) == len(w):
        raise ValueError("first, second, groups and weights must have the same length")
    if w.sum() <= 0:
        raise ValueError("nothing to resample: no item has weight")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = int(index.max()) + 1
    difference = np.bincount(index, weights=(b - a) * w, minlength=n_groups)
    weight = np.bincount(index, weights=w, minlength=n_groups)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    chunk = max(1, 4_000_000 // n_groups)  # bounds the index matrix to 32 MB
    for start in range(0, resamples, chunk):
        picks = generator.integers(0, n_groups, size=(min(chunk, resamples - start), n_groups))
        total = weight[picks].sum(axis=1)
        draws[start : start + len(picks)] = difference[picks].sum(axis=1) / np.where(total > 0, total, np.nan)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(float(difference.sum() / weight.sum()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two judgements of the same items: the second's rate minus the first's, and the flips behind it."""

    n: int
    interval: Interval
    lost: int  # right at first, wrong then
    won: int  # wrong at first, right then
    mcnemar_p: float


def paired_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    groups: Sequence[str],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Interval by `paired_bootstrap`, p by `mcnemar_exact`, of right-or-wrong judgements in the same order."""
    lost = sum(one > two for one, two in zip(first, second, strict=True))
    won = sum(one < two for one, two in zip(first, second, strict=True))
    interval = paired_bootstrap(first, second, groups=groups, resamples=resamples, confidence=confidence, seed=seed)
    return PairedDifference(len(first), interval, lost, won, mcnemar_exact(lost, won))


def mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided exact p-value for `lost` right-to-wrong and `won` wrong-to-right flips (McNemar 1947, binomial)."""
    n, k = lost + won, min(lost, won)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / (1 << n))


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927)."""
    if n == 0:
        raise ValueError("a proportion of nothing has no interval")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))
