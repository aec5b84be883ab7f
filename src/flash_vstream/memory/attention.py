"""Semantic attention: the abstract memory's update (paper section 3.2)."""

import math

import torch
from torch import Tensor, nn


class SemanticAttention(nn.Module):
    """Weights new features by their similarity to the abstract memory (paper section 3.2).

    ``channels`` is D, the feature width; ``hidden`` is the width of queries and keys (32 in the
    released code). Parameters are named as in the released checkpoints (``attention_model.*``).
    ``v_proj``, ``out_proj`` and ``out_ln`` exist there but play no part in the update, so this
    module holds only the query and key projections.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.q_proj = nn.Linear(channels, hidden)
        self.k_proj = nn.Linear(channels, hidden)

    def weights(self, memory: Tensor, new: Tensor) -> Tensor:
        """Softmax attention ``[n, m]`` float32 of memory tokens ``[n, D]`` over new tokens ``[m, D]``."""
        dtype = self.q_proj.weight.dtype
        queries = _finite(self.q_proj(memory.to(dtype)))
        keys = _finite(self.k_proj(new.to(dtype)))
        scores = queries.float() @ keys.float().T / math.sqrt(self.q_proj.out_features)
        return torch.softmax(scores, dim=-1)

    def forward(self, memory: Tensor, new: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """One chunk's update: ``(1 - ratio) · memory + ratio · weights @ new``.

        Returns the new memory ``[n, D]`` and the weights ``[n, m]``. The weights of a row sum to
        one, so the memory stays a convex combination of the features seen.
        """
        weights = self.weights(memory, new).to(memory.dtype)
        return memory * (1 - ratio) + ratio * (weights @ new), weights


def _finite(projected: Tensor) -> Tensor:
    """``projected`` clamped to its dtype's range: float16 overflows above 65504, and a softmax of infinities is NaN."""
    return projected.clamp(torch.finfo(projected.dtype).min, torch.finfo(projected.dtype).max)


def abstract_memory(features: Tensor, length: int, attention: SemanticAttention, ratio: float) -> Tensor:
    """The abstract memory of a whole video: ``[T, P², D]`` to ``[min(T, length), P², D]``.

    The first ``length`` frames fill it; every further chunk of up to ``length`` frames updates it by
    ``ratio``. Differentiable, and equal to the streaming memory's result at every T.
    """
    frames, tokens, channels = features.shape
    memory = features[:length].reshape(-1, channels)
    for begin in range(length, frames, max(length, 1)):
        chunk = features[begin : begin + length].reshape(-1, channels)
        memory, _ = attention(memory, chunk, ratio)
    return memory.reshape(-1, tokens, channels)
