"""Small memories."""

import torch

from flash_vstream.memory import SemanticAttention, StarConfig, StarMemory


def small_memory() -> StarMemory:
    config = StarConfig(spatial_size=2, temporal_size=1, temporal_length=4, abstract_length=3, retrieved_length=1)
    torch.manual_seed(0)
    return StarMemory(config, 8, SemanticAttention(8, 4))
