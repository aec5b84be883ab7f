"""Intervals and comparisons. Questions about one video are not independent, so whole videos are resampled."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
FEWEST_GROUPS = 5


def bootstrap_interval(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """The 95% percentile bootstrap interval of the mean of ``values``, resampling whole ``groups`` (videos).

    None for fewer than ``FEWEST_GROUPS`` groups, which are too few to generalise from.
    """
    if len(set(groups)) < FEWEST_GROUPS:
        return None
    sums, counts = _by_group(values, groups)
    means = _resampled(sums, counts, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def format_interval(interval: tuple[float, float] | None) -> str:
    """Format an interval of shares as percentages, or as a dash when there is none."""
    return "-" if interval is None else "{:.1%} - {:.1%}".format(*interval)


def paired_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str], seed: int = 0
) -> tuple[float, tuple[float, float] | None, float | None]:
    """The mean of ``second - first``, its 95% interval, and a two-sided bootstrap p-value.

    The interval and p-value are None for fewer than ``FEWEST_GROUPS`` groups.
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    if len(set(groups)) < FEWEST_GROUPS:
        return float(difference.mean()), None, None
    sums, counts = _by_group(difference.tolist(), groups)
    means = _resampled(sums, counts, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(difference.mean()), (float(low), float(high)), float(min(1.0, 2 * tail))


def _by_group(values: Sequence[float], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, float), minlength=len(names))
    return sums, np.bincount(index, minlength=len(names)).astype(float)


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    means: np.ndarray = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
