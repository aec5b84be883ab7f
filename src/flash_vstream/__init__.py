"""Flash-VStream: watch a video stream of any length in constant memory, and answer questions about it.

Public names are loaded on first use, so that ``import flash_vstream`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
