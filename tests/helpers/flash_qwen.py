"""The tiny Flash-VStream-Qwen that the released code was recorded with."""

from pathlib import Path

import torch
from torch import Tensor

from flash_vstream.memory import MemorySnapshot, StarConfig
from flash_vstream.memory.flash_release import ReleaseFlashMemory
from flash_vstream.models.choice import ModelChoice
from flash_vstream.pipeline import FlashVStream
from helpers.goldens import write_tiny_qwen
from helpers.vlms import marked_tokenizer

SIZES = {"temporal_length": 8, "retrieved_length": 4, "spatial_length": 0, "abstract_length": 0, "abstract_size": 1}
SMALL = StarConfig(spatial_size=4, temporal_size=2, **SIZES)
RELEASE = StarConfig(spatial_size=4, temporal_size=2, compat="release", **SIZES)
CHANNELS = 160


def write_folder(folder: Path) -> Path:
    """The checkpoint in ``folder``, with a tokenizer."""
    write_tiny_qwen(folder)
    marked_tokenizer().save_pretrained(folder)
    return folder


def load_tiny(folder: Path, star: StarConfig = SMALL) -> FlashVStream:
    """The checkpoint on the CPU in float32."""
    return FlashVStream.from_pretrained(ModelChoice(str(folder), "cpu", "float32", star=star))


def released_memory(
    features: Tensor, permutation: Tensor | None, star: StarConfig = RELEASE, **methods
) -> MemorySnapshot:
    """What the released code's memory of a whole video makes of encoded frames ``[T, P², 5C]``."""
    memory = ReleaseFlashMemory(star, CHANNELS, offline=True, permute=lambda n: permutation, **methods)
    memory.write(features, [float(i) for i in range(len(features))])
    return memory.read()


def joined(low: Tensor, steps: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Encoded frames of low-resolution tokens ``[T, n, 32]``, with high ones ``[k, 4n, 32]`` for a few ``steps``.

    The memory never compares high resolutions, so those that it does not return may be left out: they are zeros.
    """
    frames, tokens, channels = low.shape
    whole = torch.zeros(frames, 4 * tokens, channels)
    if steps is not None:
        whole[steps] = high
    # Four tokens that the merger joins side by side, and a quarter of their low resolution behind them.
    return torch.cat([whole.reshape(frames, tokens, -1), low.reshape(frames, tokens, -1)], 2)
