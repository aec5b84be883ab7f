"""RGB frames to the squares, and the pixels, that a vision tower expects. Needs no Transformers."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_ASPECT = 16
"""Pictures longer than this many times their short side are cropped before scaling."""


class FrameSquares:
    """Resize the short side, crop the centre, scale and normalise; RGB throughout.

    ``size`` is the side of the square in pixels; a value v from 0 to 255 becomes
    ``(v / 255 - mean) / std``. Frames that already have this size are only normalised, so video can be
    scaled during decoding. Results match Transformers' CLIP image processor.
    """

    size: int
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def square(self, frame: np.ndarray | Image.Image) -> np.ndarray:
        """The centre square of a frame ``[H, W, 3]`` or picture, ``[size, size, 3]`` uint8."""
        picture = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
        picture = picture.convert("RGB")
        width, height = picture.size
        if (width, height) == (self.size, self.size):
            return np.asarray(picture)
        if max(width, height) > MAX_ASPECT * min(width, height):
            # Only the centre is used, and scaling all of a very long picture could take gigabytes.
            picture = _centre(picture, MAX_ASPECT * min(width, height))
            width, height = picture.size
        short, side = min(width, height), self.size
        width, height = int(side * width / short), int(side * height / short)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        return np.asarray(picture.crop((left, top, left + side, top + side)))

    def pixels(self, frames: np.ndarray | Tensor) -> Tensor:
        """Pixels ``[B, 3, size, size]`` float32 of square frames ``[B, size, size, 3]`` uint8."""
        scale = 1 / (255 * torch.tensor(self.image_std))
        shift = torch.tensor(self.image_mean) / torch.tensor(self.image_std)
        values = torch.as_tensor(frames)
        values = values.float() * scale.to(values.device) - shift.to(values.device)
        return values.permute(0, 3, 1, 2)


def _centre(picture: Image.Image, longest: int) -> Image.Image:
    """The middle of a picture, at most ``longest`` pixels long and high."""
    width, height = picture.size
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return picture.crop((left, top, left + min(width, longest), top + min(height, longest)))
