"""The model classes, registered with Transformers' Auto classes."""

from contextlib import suppress

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.processing import FlashVStreamProcessor

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
AutoConfig.register(FlashVStreamConfig.model_type, FlashVStreamConfig)
AutoModel.register(FlashVStreamConfig, FlashVStreamForConditionalGeneration)
AutoModelForImageTextToText.register(FlashVStreamConfig, FlashVStreamForConditionalGeneration)
with suppress(ImportError):  # in some versions of Transformers this class needs torchvision
    AutoImageProcessor.register(FlashVStreamConfig, slow_image_processor_class=FrameProcessor)
AutoProcessor.register(FlashVStreamConfig, FlashVStreamProcessor)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "FlashVStreamConfig",
    "FlashVStreamForConditionalGeneration",
    "FlashVStreamProcessor",
    "FrameProcessor",
]
