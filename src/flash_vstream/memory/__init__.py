"""The STAR memory, as plain tensor code.

Public names are loaded on first use, so that its sizes and the names of its parts can be had without PyTorch.
"""

from typing import TYPE_CHECKING

from flash_vstream.imports import lazily
from flash_vstream.memory.config import PARTS, StarConfig

if TYPE_CHECKING:
    from flash_vstream.memory.attention import SemanticAttention, abstract_memory
    from flash_vstream.memory.pooling import pool_grid
    from flash_vstream.memory.snapshot import MemorySnapshot, Slots
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

_HOMES = {
    "MemorySnapshot": "snapshot",
    "SemanticAttention": "attention",
    "Slots": "snapshot",
    "StarMemory": "star",
    "abstract_memory": "attention",
    "pool_grid": "pooling",
}

__getattr__ = lazily(__name__, _HOMES)
