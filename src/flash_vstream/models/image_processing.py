"""What converts RGB frames to pixels, as a Transformers image processor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from flash_vstream.models.squares import FrameSquares


class FrameProcessor(FrameSquares, BaseImageProcessor):
    """``FrameSquares`` of ``size``, ``image_mean`` and ``image_std``."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 224,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, **_: Any) -> BatchFeature:
        """``pixel_values [B, 3, size, size]`` of one or several frames of any size."""
        batch = [images] if isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3 else list(images)
        return BatchFeature({"pixel_values": self.pixels(np.stack([self.square(frame) for frame in batch]))})
