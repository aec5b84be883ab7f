"""States that earlier versions saved, in the form of today's."""

from collections.abc import Mapping

import torch
from torch import Tensor

_WEIGHT = 4


def upgraded(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with what version 0.1 did not save yet; ``own`` is a state of the memory to be restored."""
    state = dict(state)
    if "temporal.remainders" in own and "temporal.centroids" in state:
        state.setdefault("temporal.remainders", torch.zeros_like(own["temporal.remainders"]))
        if (distances := state.pop("temporal.distances", None)) is not None:
            state["temporal.costs"] = _costs(distances, state)
    return state


def _costs(distances: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """What it costs to merge each pair of rows, from their distances; infinite for rows not in use."""
    weights = state["temporal.stats"][_WEIGHT]
    filled, free, rows = int(state["temporal.filled"]), int(state["temporal.free"]), len(weights)
    used = torch.arange(rows) < filled
    if filled == rows - 1:
        used = torch.arange(rows) != free
    costs = distances.double() * (weights[:, None] * weights / (weights[:, None] + weights))
    return torch.where(used[:, None] & used, costs, float("inf")).fill_diagonal_(float("inf"))
