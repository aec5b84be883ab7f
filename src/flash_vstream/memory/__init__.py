"""The STAR memory, as plain tensor code."""

from flash_vstream.memory.attention import SemanticAttention, abstract_memory
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.pooling import pool_grid
from flash_vstream.memory.snapshot import PARTS, MemorySnapshot, Slots
from flash_vstream.memory.star import StarMemory

__all__ = [
    "PARTS",
    "MemorySnapshot",
    "SemanticAttention",
    "Slots",
    "StarConfig",
    "StarMemory",
    "abstract_memory",
    "pool_grid",
]
