"""A text-image pair, such as SigLIP or CLIP: how well a picture fits a text, for models that cannot tell themselves."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextImagePair(nn.Module):
    """Two towers whose outputs are compared by their cosine.

    What it sees of a frame is spread over a few further channels of the frame's tokens, in blocks that survive pooling
    to the long-term memory's grid. So it needs no place of its own in a memory, and ``gather`` finds it again.

    ``source`` has the mean and the standard deviation that the frames it is given were normalised with,
    ``own`` those that its image tower was trained with.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
    ):
        super().__init__()
        self.network: Any = network
        self.tokenizer = tokenizer
        self._source, self._own = source, own
        self.size = int(network.config.vision_config.image_size)
        text = network.config.text_config
        width: Any = getattr(network.config, "projection_dim", None) or text.projection_size
        self.width = int(width)

    def channels(self, kept: int) -> int:
        """The further channels of each token, for frames that are kept on a grid of ``kept`` x ``kept``."""
        return math.ceil(self.width / kept**2)

    def drop_vision(self) -> None:
        """Free the image tower, in a process that only answers."""
        self.network.vision_model = nn.Identity()

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``[B, width]`` of frames ``[B, 3, H, W]``."""
        (mean, std), (own_mean, own_std) = (
            torch.tensor(values).reshape(2, 1, 3, 1, 1).to(pixels.device) for values in (self._source, self._own)
        )
        frames = functional.interpolate(
            pixels.float() * std + mean, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        own = ((frames - own_mean) / own_std).to(self.network.dtype)
        return _unit(self.network.get_image_features(pixel_values=own))

    @torch.no_grad()
    def read(self, text: str) -> Tensor:
        """The unit vector ``[width]`` of a text."""
        longest = int(self.network.config.text_config.max_position_embeddings)
        device = self.network.device
        tokens = self.tokenizer(text, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        return _unit(self.network.get_text_features(input_ids=tokens["input_ids"].to(device)))[0]

    def spread(self, pixels: Tensor, side: int, kept: int) -> Tensor:
        """What it sees of frames as further channels ``[B, side², channels]``, alike within what pools to one token."""
        seen = self.see(pixels)
        channels = self.channels(kept)
        grid = functional.pad(seen, (0, channels * kept**2 - self.width)).reshape(len(seen), kept, kept, channels)
        wide = grid.repeat_interleave(side // kept, 1).repeat_interleave(side // kept, 2)
        return wide.reshape(len(seen), side**2, channels)

    def gather(self, features: Tensor) -> Tensor:
        """Unit vectors ``[n, width]`` of kept frames ``[n, kept², D]`` whose last channels are those of ``spread``."""
        channels = self.channels(math.isqrt(features.shape[1]))
        return functional.normalize(features[..., -channels:].float().flatten(1)[:, : self.width], dim=1)


def _unit(output: Any) -> Tensor:
    return functional.normalize(getattr(output, "pooler_output", output).float(), dim=-1)
