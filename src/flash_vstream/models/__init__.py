"""The networks, as Transformers classes.

Using any of these names imports PyTorch and Transformers and registers the classes with Transformers'
Auto classes. Importing this package does neither, so that listing the models is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_vstream.models.registry import (
        EfficientNetLiteConfig,
        EfficientNetLiteModel,
        FlashVStreamConfig,
        FlashVStreamForConditionalGeneration,
        FlashVStreamProcessor,
        FrameProcessor,
    )

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "FlashVStreamConfig",
    "FlashVStreamForConditionalGeneration",
    "FlashVStreamProcessor",
    "FrameProcessor",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.registry"), name)
