"""The memory of the released Flash-VStream-Qwen code, quirks included (arXiv 2506.23825; ``compat="release"``).

Only for parity with published numbers and for comparison. What it calls a step is a frame here: a feature map at high
resolution and one at low resolution. Its quirks: both banks keep every step, so they grow without limit; a centroid's
time stamp is the mean place of its members in the window that was clustered, whatever their times; k-means starts at
random and divides by zero when a cluster stays empty; with fewer different steps than slots every weight is 1; its PCA
keeps the directions in which tokens differ least, and averages without weights; and in real time the tokens' positions
tell neither rows nor times apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flash_vstream.memory.checks import checked_frames
from flash_vstream.memory.clustering import lloyd
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.flash import split_resolutions
from flash_vstream.memory.locks import Locked
from flash_vstream.memory.snapshot import MemorySnapshot, Slots

Permute = Callable[[int], Tensor]
PCA_DIM = 32
"""The release's ``flash_memory_temporal_pca_dim``."""


@dataclass(frozen=True)
class ReleaseSnapshot(MemorySnapshot):
    """A snapshot of the released memory; its two forms give their tokens different positions."""

    real_time: bool = False


class Synopsis(NamedTuple):
    """A Context Synopsis Memory (CSM): centroids ``[k, n, D]``, weights ``[k]`` and time stamps ``[k]``, in steps."""

    features: Tensor
    weights: Tensor
    stamps: Tensor


def ordered_kmeans(
    features: Tensor,
    length: int,
    permute: Permute = torch.randperm,
    weights: Tensor | None = None,
    pca_dim: int | None = None,
) -> Synopsis:
    """The release's ``weighted_kmeans_ordered_feature``: steps ``[T, n, D]`` to ``length`` centroids in time order.

    ``permute(n)`` is the random order that it starts from, over the n different steps in lexicographic order. Up to
    ``length`` steps are returned unchanged. With ``pca_dim``, it is ``torchpca_weighted_kmeans_ordered_feature``.
    Raises ``ZeroDivisionError`` where the release does.
    """
    if weights is None:
        weights = torch.ones(len(features), dtype=features.dtype, device=features.device)
    if not 0 < length < len(features):
        kept = slice(min(length, len(features)))
        return Synopsis(features[kept], weights[kept], torch.arange(len(features[kept]), dtype=torch.float64))
    points = features.flatten(1) if pca_dim is None else least_components(features, pca_dim)
    different, kind = torch.unique(points, dim=0, return_inverse=True)
    kinds = [(kind == i).nonzero()[:, 0] for i in range(len(different))]
    if len(kinds) < length:
        members = [torch.tensor([i], device=points.device) for i in range(length - len(kinds))]
        members += sorted(kinds, key=lambda own: int(own[0]))
        weights = torch.ones_like(weights)
        totals = weights[:length]
    else:
        start = torch.stack([kinds[i][0] for i in permute(len(kinds))[:length].tolist()])
        labels = lloyd(points, weights, start).labels
        members = [(labels == i).nonzero()[:, 0] for i in range(length)]
        if any(len(own) == 0 for own in members):
            raise ZeroDivisionError("a cluster is empty, and the released code divides by its size; use compat='none'")
        members.sort(key=lambda own: float(own.double().mean()))
        totals = torch.stack([weights[own].sum() for own in members])
    shares = weights.to(features.dtype) if pca_dim is None else torch.ones_like(weights, dtype=features.dtype)
    whole = features.flatten(1)
    centroids = torch.stack([shares[own] @ whole[own] / shares[own].sum() for own in members])
    stamps = torch.stack([own.double().mean() for own in members]).cpu()
    return Synopsis(centroids.reshape(length, *features.shape[1:]), totals, stamps)


def least_components(features: Tensor, count: int) -> Tensor:
    """Steps ``[T, n, D]`` as ``[T, n · count]``: each token in the ``count`` directions in which tokens differ least.

    The directions of least variance, which the release takes for the principal ones. An eigenvector has no sign of its
    own; here its largest entry is positive, so that a recorded order has one meaning.
    """
    tokens = features.flatten(0, 1).float()
    tokens = tokens - tokens.mean(0)
    directions = torch.linalg.eigh(tokens.T @ tokens / (len(tokens) - 1)).eigenvectors[:, :count]
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    projected: Tensor = tokens @ directions
    return projected.reshape(len(features), -1)


def synopsis(method: str, features: Tensor, length: int, permute: Permute, weights: Tensor | None = None) -> Synopsis:
    """The release's ``temporal_compress`` by ``flash_memory_temporal_method``, as far as its methods run.

    ``features [T, n, 4C]`` hold the four tokens of C channels that the merger joins side by side.
    """
    if method == "sample" and len(features) > length:
        kept = torch.linspace(0, len(features) - 1, length).long()
        return Synopsis(features[kept], torch.ones(length), kept.double())
    if method not in ("kmeans_ordered", "fast_kmeans_ordered", "torchpca_kmeans_ordered", "sample"):
        raise ValueError(
            f"flash_memory_temporal_method {method!r} is not supported; the published one is kmeans_ordered"
        )
    if method != "torchpca_kmeans_ordered":
        return ordered_kmeans(features, length, permute, weights)
    single = features.reshape(len(features), 4 * features.shape[1], -1)  # the merger's four tokens are one row of ours
    centroids, totals, stamps = ordered_kmeans(single, length, permute, weights, PCA_DIM)
    return Synopsis(centroids.reshape(-1, *features.shape[1:]), totals, stamps)


def detailed_steps(method: str, context: Synopsis, bank: Tensor, length: int) -> Tensor:
    """Which steps of ``bank [T, n, D]`` keep their high resolution: the Detail Augmentation Memory (DAM).

    With the published ``klarge_retrieve``, those nearest to the ``length`` heaviest centroids, heaviest first.
    ``klarge_retrieve_cos`` takes the least similar ones, which is a quirk.
    """
    if len(bank) <= length:
        return torch.arange(len(bank))
    if method == "sample":
        return torch.linspace(0, len(bank) - 1, length).round().long()
    heavy = torch.argsort(context.weights, descending=True, stable=True)[:length]
    if method == "nearest":
        return context.stamps[heavy.cpu()].round().long()
    centroids, steps = context.features[heavy].flatten(1), bank.flatten(1)
    if method == "klarge_retrieve_cos":
        return (normalize(centroids, dim=1) @ normalize(steps, dim=1).T).argmin(1).cpu()
    if method != "klarge_retrieve":
        raise ValueError(f"flash_memory_spatial_method {method!r} is unknown; the published one is klarge_retrieve")
    squares = centroids.square().sum(1)[:, None] + steps.square().sum(1)[None]
    return (squares - 2 * centroids @ steps.T).argmin(1).cpu()


class ReleaseFlashMemory(Locked):
    """The release's flash memory behind the interface of ``StarMemory``.

    In the real-time form, a write is one call of its ``embed_new_video_clip``; with ``offline=True`` a read compresses
    all steps at once, as its ``FlashMemory.forward`` does. ``write`` takes encoded frames ``[T, P², 5C]``
    (``join_resolutions``); grids need not be square. In a snapshot, ``mean`` is the time in steps that the release
    gives to a slot, and the other times are seconds.
    """

    def __init__(
        self,
        config: StarConfig,
        channels: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offline: bool = False,
        permute: Permute = torch.randperm,
        temporal_method: str = "kmeans_ordered",
        spatial_method: str = "klarge_retrieve",
    ):
        super().__init__()
        self.config, self.channels, self.offline = config, channels, offline
        self._permute = permute
        self._methods = temporal_method, spatial_method
        # The banks take their number of tokens from the first write.
        self._high = torch.zeros(0, 0, channels // 5 * 4, dtype=dtype, device=device)
        self._low = torch.zeros_like(self._high)
        self._times = torch.zeros(0, dtype=torch.float64)
        self._context = torch.zeros_like(self._high)
        self._weights = torch.zeros(0, device=device)
        self._stamps = torch.zeros(0, dtype=torch.float64)

    @property
    def frames(self) -> int:
        """Frames written so far, all of them still in the banks."""
        return len(self._times)

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame in seconds; None before the first."""
        return float(self._times[-1]) if self.frames else None

    @property
    def nbytes(self) -> int:
        """The memory's size in bytes; grows with every frame."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    @torch.no_grad()
    def write(self, features: Tensor, times: Tensor | list[float]) -> None:
        """Write frames ``[T, P², 5C]`` at ``times [T]`` seconds; raises ``ValueError`` as ``StarMemory.write`` does."""
        with self._lock:
            newest = float(self._times[-1]) if self.frames else math.nan
            dtype, whole = self._high.dtype, features.flatten(1)[:, None]  # a grid of 1x1: any shape will do
            _, times = checked_frames(whole, times, channels=whole.shape[2], side=1, dtype=dtype, newest=newest)
            high, low = split_resolutions(features.to(self._high))
            first = not self.frames
            self._high = high.clone() if first else torch.cat([self._high, high])
            self._low = low.clone() if first else torch.cat([self._low, low])
            self._times = torch.cat([self._times, times])
            if not self.offline:
                window = low if first else torch.cat([self._context, low])
                weights = torch.cat([self._weights, torch.ones(len(low)).to(self._weights)])
                context = synopsis(self._methods[0], window, self.config.temporal_length, self._permute, weights)
                self._context, self._weights, self._stamps = context

    @torch.no_grad()
    def read(self) -> MemorySnapshot:
        """A snapshot of the memory as the release passes it on. Raises ``ValueError`` before the first frame."""
        with self._lock:
            if not self.frames:
                raise ValueError("the memory is empty; write at least one frame before reading it")
            context = Synopsis(self._context, self._weights, self._stamps)
            if self.offline:
                context = synopsis(self._methods[0], self._low, self.config.temporal_length, self._permute)
            steps = detailed_steps(self._methods[1], context, self._low, self.config.retrieved_length)
            seen = self._times[steps]
            details = Slots(self._high[steps], seen, seen, steps.double(), seen, torch.ones_like(seen))
            first, last = (self._times[at].expand(len(context.stamps)) for at in (0, -1))
            weights = context.weights.double().cpu()
            temporal = Slots(context.features.clone(), first, last, context.stamps.clone(), first, weights)
            none = Slots.of_frames(self._high[:0], self._times[:0])
            time = float(self._times[-1])
            return ReleaseSnapshot(none, temporal, details, none, none, time, self.frames, real_time=not self.offline)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the memory by name."""
        return {name[1:]: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state; raises ``ValueError`` if names differ."""
        if self.state_dict().keys() != state.keys():
            raise ValueError("not a state of the released Flash-VStream-Qwen memory")
        for name, value in state.items():
            setattr(self, f"_{name}", value.clone())
