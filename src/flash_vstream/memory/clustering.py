"""Weighted k-means: the exact streaming merge, and Lloyd's iterations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LLOYD_ITERATIONS = 10
LLOYD_TOLERANCE = 1e-4


def squared_distances(points: Tensor, point: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances ``[n]`` from ``points [n, d]`` to ``point [d]``.

    Computed from the differences: the expanded form |a|² - 2ab + |b|² suffers cancellation for
    near-duplicate frames, which are exactly the ones that compete to be merged. ``scratch [n, d]``
    is overwritten.
    """
    differences = torch.sub(points, point, out=scratch) if scratch is not None else points - point
    distances: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return distances.square_()


def merge_costs(distances: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
    """The increase of the k-means objective from merging a point with each of n others.

    That is ``w_i w / (w_i + w) · d²_i``, in float64, for squared ``distances [n]`` to points of ``weights [n]``, all
    positive.
    """
    costs: np.ndarray = distances.astype(np.float64) * (weights * weight / (weights + weight))
    return costs


def merged_costs(costs: np.ndarray, weights: np.ndarray, first: int, second: int) -> np.ndarray:
    """What merging the union of points ``first`` and ``second`` with each of n points costs, as ``merge_costs`` does.

    It follows from ``costs [n, n]``, what merging each pair costs, without the points (Ward's case of the recurrence of
    Lance and Williams 1967). The two entries of the union itself have no meaning.
    """
    own, other = weights[first], weights[second]
    joined: np.ndarray = (own + weights) * costs[first] + (other + weights) * costs[second]
    joined -= weights * costs[first, second]
    joined /= own + other + weights
    return joined


def cheapest_pair(costs: np.ndarray) -> tuple[int, int]:
    """The pair (i < j) that is cheapest to merge, by its cost in ``costs [n, n]``; the first such pair in a tie.

    This is the optimal k-means clustering of n weighted points into n - 1 clusters: any partition
    other than one pair plus singletons decomposes into merges that cost at least as much.
    """
    first, second = divmod(int(costs.argmin()), costs.shape[0])
    return min(first, second), max(first, second)


@dataclass(frozen=True)
class Clusters:
    """The result of ``lloyd``: ``centroids [k, d]``, ``labels [n]`` and the clusters' ``weights [k]``."""

    centroids: Tensor
    labels: Tensor
    weights: Tensor


def lloyd(
    points: Tensor,
    weights: Tensor,
    start: Tensor,
    refill: Callable[[], int] | None = None,
) -> Clusters:
    """Weighted k-means by Lloyd's algorithm, starting from the rows ``start [k]`` of ``points [n, d]``.

    Stops after ten iterations, or when the centroids move by less than 1e-4 in total, as in the
    released code. ``weights [n]`` are the points' weights; a cluster's weight is their sum. A cluster
    that loses all its points restarts at the row that ``refill`` draws or, without ``refill``, at the
    point farthest from its centroid, which keeps the result deterministic. On convergence the returned
    centroids are those that the labels were assigned to, one update before the stop (the release's rule).
    """
    k = start.numel()
    centroids = points[start].clone()
    labels = torch.zeros(len(points), dtype=torch.long, device=points.device)
    totals = weights.new_zeros(k)
    for _ in range(LLOYD_ITERATIONS):
        distances = torch.stack([squared_distances(points, centroid) for centroid in centroids], 1)
        labels = distances.argmin(1)
        member = torch.nn.functional.one_hot(labels, k).to(weights.dtype) * weights[:, None]  # [n, k]
        totals = member.sum(0)
        moved = (member.to(points.dtype).T @ points) / totals.clamp_min(torch.finfo(points.dtype).tiny)[:, None].to(
            points.dtype
        )
        farthest = distances.gather(1, labels[:, None])[:, 0].argsort(descending=True, stable=True).tolist()
        for empty in (totals == 0).nonzero()[:, 0].tolist():
            moved[empty] = points[refill() if refill is not None else farthest.pop(0)]
        if torch.linalg.vector_norm(centroids - moved, dim=1).sum() < LLOYD_TOLERANCE:
            break
        centroids = moved
    return Clusters(centroids, labels, totals)
