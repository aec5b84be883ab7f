"""Selection of the real frames to return at full resolution: the heaviest clusters, and the FIFO buffer."""

import torch
from torch import Tensor


def heaviest(weights: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest ``weights [n]``, in ascending order; ties go to the older."""
    return torch.argsort(weights, descending=True, stable=True)[:count].sort().values


def nearest_frames(frames: Tensor, centroids: Tensor) -> Tensor:
    """For each of ``centroids [k, P², D]``, the index of the nearest of ``frames [n, P², D]``.

    Uses the Euclidean distance over the whole feature map; ties go to the older frame.
    """
    points = frames.flatten(1).float()
    return torch.stack([(points - centroid).square().sum(1).argmin() for centroid in centroids.flatten(1).float()])


class FrameBuffer:
    """The paper's FIFO feature buffer (section 3.2): the newest ``length`` frames, in a preallocated ring."""

    def __init__(self, length: int, tokens: int, channels: int, dtype: torch.dtype, device: torch.device | str):
        self._frames = torch.zeros(length, tokens, channels, dtype=dtype, device=device)
        self._times = torch.zeros(length, dtype=torch.float64)
        self._pushed = torch.zeros((), dtype=torch.int64)

    def push(self, frame: Tensor, time: float) -> None:
        """Add a frame ``[P², D]`` at ``time``; a full buffer drops its oldest frame."""
        row = int(self._pushed) % len(self._frames)
        self._frames[row] = frame
        self._times[row] = time
        self._pushed += 1

    def read(self) -> tuple[Tensor, Tensor]:
        """The frames ``[n, P², D]`` and their times ``[n]``, oldest first."""
        pushed, length = int(self._pushed), len(self._frames)
        order = torch.arange(max(0, pushed - length), pushed) % length
        return self._frames[order], self._times[order]

    def state_dict(self) -> dict[str, Tensor]:
        """The buffer's tensors by name."""
        return {"frames": self._frames, "times": self._times, "pushed": self._pushed}
