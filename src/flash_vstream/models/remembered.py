"""Results that are computed once for each frame of a long-term memory, however often it is looked through."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor

MOST = 4096
"""How many frames' results are kept, over all streams; the ones used longest ago are dropped."""


class Remembered:
    """Calls ``compute`` on frames ``[n, P², D]`` that it has not seen, and remembers what it returned for each.

    ``compute`` returns tensors whose first dimension is the frames'. A frame is known by a hash of its features.
    """

    def __init__(self, compute: Callable[[Tensor], Sequence[Tensor]]):
        self._compute = compute
        self._known: OrderedDict[int, tuple[Tensor, ...]] = OrderedDict()

    def __call__(self, features: Tensor) -> list[Tensor]:
        """The results for all frames, stacked in their order."""
        keys = _hashes(features)
        fresh = [i for i, key in enumerate(keys) if key not in self._known]
        if fresh:
            results = self._compute(features[fresh])
            for at, i in enumerate(fresh):
                self._known[keys[i]] = tuple(result[at].clone() for result in results)
        found = []
        for key in keys:
            self._known.move_to_end(key)
            found.append(self._known[key])
        while len(self._known) > max(MOST, len(keys)):
            self._known.popitem(last=False)
        return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _hashes(features: Tensor) -> list[int]:
    rows = features.detach().cpu().contiguous().reshape(len(features), -1).view(torch.uint8).numpy()
    return [xxhash.xxh3_64_intdigest(row.data) for row in rows]
