"""Flash-VStream: watch a video stream of any length in constant memory, and answer questions about it.

Public names are loaded on first use, so that ``import flash_vstream`` is fast.
"""

from typing import TYPE_CHECKING

from flash_vstream.imports import lazily

if TYPE_CHECKING:
    from flash_vstream.errors import UserError
    from flash_vstream.memory import MemorySnapshot, StarConfig, StarMemory
    from flash_vstream.models import (
        FlashVStreamConfig,
        FlashVStreamForConditionalGeneration,
        FlashVStreamProcessor,
    )
    from flash_vstream.pipeline import FlashVStream, Stream

__version__ = "0.2.0.dev0"

_HOMES = {
    "FlashVStream": "pipeline",
    "FlashVStreamConfig": "models",
    "FlashVStreamForConditionalGeneration": "models",
    "FlashVStreamProcessor": "models",
    "MemorySnapshot": "memory",
    "StarConfig": "memory",
    "StarMemory": "memory",
    "Stream": "pipeline",
    "UserError": "errors",
}

__all__ = [
    "FlashVStream",
    "FlashVStreamConfig",
    "FlashVStreamForConditionalGeneration",
    "FlashVStreamProcessor",
    "MemorySnapshot",
    "StarConfig",
    "StarMemory",
    "Stream",
    "UserError",
]


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
