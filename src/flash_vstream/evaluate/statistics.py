"""Intervals and comparisons. Questions about one video are not independent, so whole videos are resampled."""

from collections import Counter
from collections.abc import Mapping, Sequence

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


def kind_weights(kinds: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Each kind's weight in a mean over categories that are means of their kinds; pairs of kind and category."""
    sizes = Counter(category for _, category in kinds)
    return {kind: 1 / (len(sizes) * sizes[category]) for kind, category in kinds}


def weighted_kinds(
    values: Sequence[float], groups: Sequence[str], kinds: Sequence[str], weights: Mapping[str, float], seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """The weighted mean of the means of each kind, and its bootstrap interval over whole ``groups``.

    A resample that lacks a kind shares its weight among the others.
    """
    names = sorted(weights)
    share = np.array([weights[name] for name in names])
    tables = [_by_group([v * (k == name) for v, k in zip(values, kinds, strict=True)], groups)[0] for name in names]
    counted = [_by_group([float(k == name) for k in kinds], groups)[0] for name in names]
    sums, counts = np.stack(tables, 1), np.stack(counted, 1)  # [groups, kinds]
    mean = float((share * sums.sum(0) / counts.sum(0)).sum() / share.sum())
    if len(sums) < FEWEST_GROUPS:
        return mean, None
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    hits, seen = sums[drawn].sum(1), counts[drawn].sum(1)  # [resamples, kinds]
    present = share * (seen > 0)
    means = (present * hits / np.maximum(seen, 1)).sum(1) / present.sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return mean, (float(low), float(high))


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
