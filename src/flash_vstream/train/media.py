"""Images and videos of a training set as features, for data that was not encoded before."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import read_frames

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def media_encoder(model_folder: Path) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """A function from a picture's or video's path to features ``[T, P², D]`` and times ``[T]``.

    The model is loaded when the first medium is met. Raises ``UserError`` for media that cannot
    be read; nothing is skipped in silence.
    """
    loaded: list[FlashVStream] = []

    def encode(path: Path) -> tuple[Tensor, Tensor]:
        if not loaded:
            loaded.append(FlashVStream.from_pretrained(str(model_folder)))
        pipeline = loaded[0]
        if path.suffix.lower() in PICTURES:
            try:
                picture = Image.open(path)
                return pipeline.encode([picture]).float(), torch.zeros(1, dtype=torch.float64)
            except (OSError, UnidentifiedImageError) as error:
                raise UserError(f"{path} is not a picture that can be read ({error})") from None
        frames = list(read_frames(path, 1.0, pipeline.processor.image_processor.size))
        features = torch.cat([pipeline.encode([frame.image]) for frame in frames])
        return features.float(), torch.tensor([frame.time for frame in frames], dtype=torch.float64)

    return encode
