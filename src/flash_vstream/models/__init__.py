"""The networks, as Transformers classes.

Using any of these names imports PyTorch and Transformers and registers the classes with Transformers'
Auto classes. Importing this package does neither, so that listing the models is fast.
"""

from typing import TYPE_CHECKING

from flash_vstream.imports import lazily

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

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "registry"))
