"""Flash-VStream: watch a video stream of any length in constant memory, and answer about it.

The public names are loaded when they are first used, so that ``import flash_vstream`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_vstream.errors import UserError
    from flash_vstream.memory import MemoryView, StarConfig, StarMemory
    from flash_vstream.models import (
        FlashVStreamConfig,
        FlashVStreamForConditionalGeneration,
        FlashVStreamProcessor,
    )
    from flash_vstream.stream import FlashVStream, Stream

__version__ = "0.1.0"

_HOMES = {
    "FlashVStream": "stream",
    "FlashVStreamConfig": "models",
    "FlashVStreamForConditionalGeneration": "models",
    "FlashVStreamProcessor": "models",
    "MemoryView": "memory",
    "StarConfig": "memory",
    "StarMemory": "memory",
    "Stream": "stream",
    "UserError": "errors",
}

__all__ = [
    "FlashVStream",
    "FlashVStreamConfig",
    "FlashVStreamForConditionalGeneration",
    "FlashVStreamProcessor",
    "MemoryView",
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
