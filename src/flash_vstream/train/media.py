"""Encode the images and videos of a training set whose features were not precomputed."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from flash_vstream.pipeline import FlashVStream


def media_encoder(model_folder: Path) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """Return a function from an image or video path to features ``[T, P², D]`` and times ``[T]``.

    The function loads the model on its first call and raises ``UserError`` for unreadable media.
    """
    pipeline = lru_cache(maxsize=1)(lambda: FlashVStream.from_pretrained(str(model_folder)))

    def encode(path: Path) -> tuple[Tensor, Tensor]:
        times, features = zip(*pipeline().encode_file(path), strict=True)
        # On the CPU, wherever the model is: a data loader pins what it is given.
        return torch.cat(features).cpu(), torch.tensor([time for part in times for time in part], dtype=torch.float64)

    return encode
