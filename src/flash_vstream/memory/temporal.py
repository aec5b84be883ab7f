"""Centroids of a weighted k-means over all frames so far: the temporal memory, and the long-term memory."""

import math

import numpy as np
import torch
from torch import Tensor

from flash_vstream.memory.clustering import cheapest_pair, lloyd, merge_costs, merged_costs, squared_distances
from flash_vstream.memory.pooling import pool_grid
from flash_vstream.memory.snapshot import Slots

TIE = 1e-6
"""Distances that differ by less than this share are equal, whatever rounding says."""
_STATE = ("centroids", "remainders", "exemplars", "stats", "first", "costs", "filled", "free")
_START, _END, _MEAN, _EXEMPLAR, _WEIGHT = range(5)


class ClusterMemory:
    """``length`` weighted centroids ``[side², D]``, each with its times and a real frame near it.

    The paper's temporal memory (section 3.2): weighted k-means over all frames so far. The rows of
    the state are in no particular order, so that a merge changes only one row; ``read`` sorts them
    by their first frames. Real frames are kept at ``exemplar_side``, unless that is 0: of every two that are merged,
    the one nearer to the new centroid.

    A centroid is the sum of two float32 rows: a mean over n frames moves by 1/n of a difference, which
    plain float32 loses after 2^24 frames. Distances, which are most of
    the work, are computed from the first rows only, the centroids rounded to float32. What it would cost
    to merge each pair is kept: measured for a new frame, and derived for a merged row from what its parts
    cost. So few numbers as costs and times are faster in NumPy, which shares them with their tensors on
    the CPU.
    """

    def __init__(
        self,
        length: int,
        side: int,
        exemplar_side: int,
        channels: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self._length = length
        self._side = side
        self._exemplar_side = exemplar_side
        self._keep_exemplars = exemplar_side > 0
        rows = self._length + 1  # one extra, for the incoming frame
        self._centroids = torch.zeros(rows, side**2 * self._compared_channels(channels), device=device)
        self._remainders = torch.zeros_like(self._centroids)
        self._differences = torch.empty_like(self._centroids)  # scratch space, so that no frame allocates any
        kept = rows if self._keep_exemplars else 0
        self._exemplars = torch.zeros(kept, max(1, exemplar_side) ** 2, channels, dtype=dtype, device=device)
        self._stats = torch.zeros(5, rows, dtype=torch.float64)
        self._first = torch.zeros(rows, dtype=torch.int64)
        self._costs = torch.full((rows, rows), float("inf"), dtype=torch.float64)  # infinite for rows not in use
        self._filled = torch.zeros((), dtype=torch.int64)
        # The row for the next frame: the first unused row, or once full the row freed by the last merge.
        self._free = torch.zeros((), dtype=torch.int64)

    def merge_in(self, frame: Tensor, time: float, index: int) -> None:
        """Add frame number ``index``, ``[P², D]``; if that overfills the memory, merge the cheapest pair."""
        row = int(self._free)
        self._centroids[row] = self._compared(frame[None].float()).flatten()
        self._remainders[row] = 0
        if self._keep_exemplars:
            self._exemplars[row] = pool_grid(frame[None], self._exemplar_side)[0].to(self._exemplars.dtype)
        self._stats.numpy()[:, row] = (time, time, time, time, 1.0)
        self._first[row] = index
        filled = int(self._filled) + 1
        self._measure(row, filled)
        if filled <= self._length:
            self._filled += 1
            self._free.fill_(filled)
            return
        first, second = cheapest_pair(self._costs.numpy())
        costs = merged_costs(self._costs.numpy(), self._stats[_WEIGHT].numpy(), first, second)
        self._merge(first, second)
        self._note_costs(first, filled, costs)
        self._drop(second)
        self._free.fill_(second)

    def _compared_channels(self, channels: int) -> int:
        """How many of a frame's ``channels`` are clustered."""
        return channels

    def _compared(self, frames: Tensor) -> Tensor:
        """What is clustered of frames ``[T, P², D]``: ``[T, side², compared channels]``."""
        return pool_grid(frames, self._side)

    def _points(self, frames: Tensor) -> Tensor:
        """Frames ``[T, P², D]`` as float64 points ``[T, P_tem² · D]`` in the centroids' space."""
        return _double(self._compared(frames.float()).flatten(1))

    def _exact(self, rows: Tensor) -> Tensor:
        """The centroids of ``rows`` as ``[n, P_tem² · D]`` float64."""
        return _double(self._centroids[rows]) + _double(self._remainders[rows])

    def _store(self, rows: slice, exact: Tensor) -> None:
        """Store float64 points as the centroids of ``rows``."""
        rounded = exact.float()
        self._centroids[rows] = rounded.to(self._centroids.device)
        self._remainders[rows] = (exact - rounded).float().to(self._remainders.device)

    def _measure(self, row: int, filled: int) -> None:
        """Update what it would cost to merge ``row`` with each of the ``filled`` first rows."""
        used = slice(filled)
        distances = squared_distances(self._centroids[used], self._centroids[row], self._differences[used])
        weights = self._stats[_WEIGHT].numpy()
        self._note_costs(row, filled, merge_costs(distances.cpu().numpy(), weights[used], weights[row]))

    def _note_costs(self, row: int, filled: int, costs: np.ndarray) -> None:
        """Keep what it costs to merge ``row`` with each of the ``filled`` first rows."""
        used = slice(filled)
        costs[row] = np.inf
        table = self._costs.numpy()
        table[row, used] = costs
        table[used, row] = costs

    def _drop(self, row: int) -> None:
        """Take ``row`` out of the running until it is filled again."""
        table = self._costs.numpy()
        table[row] = np.inf
        table[:, row] = np.inf

    def _merge(self, into: int, other: int) -> None:
        """Merge row ``other`` into row ``into``: its centroid, exemplar, times and weight."""
        pair = (into, other)
        stats, first = self._stats.numpy(), self._first.numpy()
        start, end, mean, exemplar, weight = stats[:, pair]
        share = float(weight[1] / weight.sum())
        merged, rest = self._mean(into, other, share)
        nearer = self._nearer_exemplar(merged, pair)
        self._centroids[into], self._remainders[into] = merged, rest
        if self._keep_exemplars and nearer:
            self._exemplars[into] = self._exemplars[other]
        joined_mean = mean[0] + (mean[1] - mean[0]) * share
        stats[:, into] = (start.min(), end.max(), joined_mean, exemplar[nearer], weight.sum())
        first[into] = min(first[into], first[other])

    def _mean(self, into: int, other: int, share: float) -> tuple[Tensor, Tensor]:
        """The centroid and the remainder of row ``into`` after it has moved by ``share`` of the way to row ``other``.

        The step has float32 precision, and none of it is lost in the sum, however small it is (Knuth's two-sum).
        """
        centroid, remainder = self._centroids[into], self._remainders[into]
        step = (self._centroids[other] - centroid).add_(self._remainders[other]).sub_(remainder)
        step = torch.add(remainder, step, alpha=share)
        moved = centroid + step
        gained = moved - centroid
        return moved, (centroid - (moved - gained)).add_(step.sub_(gained))

    def _nearer_exemplar(self, merged: Tensor, pair: tuple[int, int]) -> int:
        """Which row of ``pair`` (0 or 1) has the exemplar nearer to the ``merged`` centroid; ties go to the older.

        The centroid of a single frame is the frame itself, and need not be pooled.
        """
        weights = self._stats[_WEIGHT].numpy()[list(pair)]
        first_frames = self._first.numpy()
        older = int(first_frames[pair[1]] < first_frames[pair[0]])
        if not self._keep_exemplars:  # no features to compare: take the heavier row's
            return older if weights[0] == weights[1] else int(weights[1] > weights[0])
        if weights.sum() == 2:  # two single frames are equidistant from their mean
            return older
        frames = [
            self._centroids[row] if weight == 1 else self._compared(self._exemplars[row][None].float()).flatten()
            for row, weight in zip(pair, weights, strict=True)
        ]
        first, second = (float(torch.dist(frame, merged)) for frame in frames)
        return older if math.isclose(first, second, rel_tol=TIE) else int(second < first)

    def consolidate(self, frames: Tensor, times: Tensor, index: int) -> None:
        """Run Lloyd's algorithm over the clusters and new ``frames [T, P_spa², D]``, numbered from ``index``.

        Starts from points spread evenly over time, where the paper starts at random, so that the same
        frames always give the same memory.
        """
        rows = self._order()
        points = torch.cat([self._exact(rows), self._points(frames)])
        single = torch.cat([times.expand(4, -1), torch.ones(1, len(times))])
        stats = torch.cat([self._stats[:, rows], single], 1)
        first = torch.cat([self._first[rows], torch.arange(index, index + len(times))])
        exemplars = frames[:0].to(self._exemplars.dtype)
        if self._keep_exemplars:
            pooled = pool_grid(frames, self._exemplar_side).to(self._exemplars.dtype)
            exemplars = torch.cat([self._exemplars[rows], pooled])
        if len(points) > self._length:
            points, stats, first, exemplars = self._clustered(points, stats, first, exemplars)
        filled = len(points)
        self._store(slice(filled), points)
        self._stats[:, :filled], self._first[:filled] = stats, first
        if self._keep_exemplars:
            self._exemplars[:filled] = exemplars
        self._filled.fill_(filled)
        self._free.fill_(filled)

    def _clustered(
        self, points: Tensor, stats: Tensor, first: Tensor, exemplars: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cluster weighted ``points``; returns the clusters' centroids, stats, first frames and exemplars."""
        start = torch.linspace(0, len(points) - 1, self._length).round().long()
        clusters = lloyd(points, stats[_WEIGHT].to(points), start)
        used = clusters.weights.cpu().nonzero()[:, 0]
        labels = clusters.labels.cpu()
        candidates = self._points(exemplars) if self._keep_exemplars else points
        joined, firsts, chosen = [], [], []
        for label in used.tolist():
            members = (labels == label).nonzero()[:, 0]
            nearest = members[squared_distances(candidates[members], clusters.centroids[label]).argmin().cpu()]
            joined.append(_joined(stats[:, members], stats[_EXEMPLAR, nearest]))
            firsts.append(first[members].min())
            chosen.append(nearest)
        kept = exemplars[torch.stack(chosen)] if self._keep_exemplars else exemplars
        return clusters.centroids[used], torch.stack(joined, 1), torch.stack(firsts), kept

    def _order(self) -> Tensor:
        """The rows in use, ordered by their first frames."""
        rows = torch.arange(self._length + 1)
        full = int(self._filled) == self._length
        rows = rows[rows != int(self._free)] if full else rows[: int(self._filled)]
        return rows[self._first[rows].argsort()]

    def read(self) -> tuple[Slots, Tensor]:
        """The slots in time order and their exemplars ``[n, exemplar_side², D]`` (empty when not kept)."""
        rows = self._order()
        centroids = self._centroids[rows].to(self._exemplars.dtype)
        start, end, mean, exemplar, weight = self._stats[:, rows]
        slots = Slots(centroids.reshape(len(rows), self._side**2, -1), start, end, mean, exemplar, weight)
        return slots, self._exemplars[rows] if self._keep_exemplars else self._exemplars[:0]

    def read_exemplars(self) -> Slots:
        """The slots in time order, each with its real frame ``[exemplar_side², D]`` for features."""
        rows = self._order()
        return Slots(self._exemplars[rows], *self._stats[:, rows])

    def state_dict(self) -> dict[str, Tensor]:
        """The memory's tensors by name."""
        return {name: getattr(self, f"_{name}") for name in _STATE}


def _double(values: Tensor) -> Tensor:
    """``values`` as float64, moved to the CPU from Apple's MPS, which has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _joined(stats: Tensor, exemplar: Tensor) -> Tensor:
    """A cluster's stats ``[5]``, from those of its members ``[5, m]`` and its exemplar's time."""
    weight = stats[_WEIGHT].sum()
    mean = (stats[_MEAN] * stats[_WEIGHT]).sum() / weight
    return torch.stack([stats[_START].min(), stats[_END].max(), mean, exemplar, weight])
