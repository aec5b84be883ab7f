"""What differs between the families of Transformers' vision-language models, so that ``vlm`` need not know it.

A frame is encoded alone, as a still picture, into the tokens that the family's language model reads: after its own
projector, merger or pixel shuffle. Everything here was tried with Transformers 5.0.0 and 5.24.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flash_vstream.errors import UserError
from flash_vstream.models.prompts import stamp

NEWLINE_TOKEN = -201
"""The id that marks the place of LLaVA-OneVision's learned newline."""
DEFAULT_SIDE = 16
"""The side of a frame's grid of tokens where a family reads pictures of any size."""

Piece = str | int
"""A piece of a prompt: text, so many visual tokens, or ``NEWLINE_TOKEN``."""


def tokens_in(output: Any) -> Tensor:
    """The tokens in whatever ``get_image_features`` returned: minor releases of Transformers differ in its form."""
    tokens = getattr(output, "pooler_output", output)
    if isinstance(tokens, list | tuple):
        tokens = torch.cat([part.flatten(0, -2) for part in tokens])
    assert isinstance(tokens, Tensor)
    return tokens


def clip_patches(clips: Tensor, patch: int, merge: int) -> Tensor:
    """Qwen's patches ``[B · h · w, C · T · p²]`` of clips ``[B, T, C, H, W]``, T the frames in one temporal patch.

    Patches of one ``merge`` x ``merge`` window, which become one token, follow one another.
    """
    count, frames, channels, height, width = clips.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"{height}x{width} pixels do not divide into windows of {patch * merge}")
    rows, columns = height // patch, width // patch
    split = clips.reshape(count, frames, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(count * rows * columns, channels * frames * patch**2)


class Family:
    """A family of models whose pictures have one size and whose positions are plain numbers."""

    title = ""
    rows = 1
    """Coordinates of a position: 3 for M-RoPE."""
    two_way = False
    """Whether a picture's tokens attend to one another in both directions."""

    def __init__(self, config: PreTrainedConfig, side: int | None = None):
        self.config: Any = config
        self.native_side = self._native_side()
        """The side of the grid of tokens that the tower makes of a frame."""
        self.side = side or self.native_side
        if self.native_side % self.side:
            raise UserError(
                f"a {self.title} frame has {self.native_side}x{self.native_side} tokens, which do not pool to"
                f" {self.side}x{self.side}; choose a spatial_size that divides {self.native_side}"
            )

    def _native_side(self) -> int:
        raise NotImplementedError

    @property
    def pixels(self) -> int:
        """The side of a frame in pixels."""
        return _square(self.config.vision_config.image_size)

    @property
    def width(self) -> int:
        """The width of the language model."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def channels(self) -> int:
        """The channels of a token."""
        return self.width

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        """Tokens ``[B, side², channels]`` of normalised pixels ``[B, 3, S, S]``."""
        tokens = tokens_in(network.model.get_image_features(pixel_values=pixels))
        return tokens.reshape(len(pixels), self.native_side**2, self.width)

    def time(self, seconds: float) -> str:
        """A time as the model reads it."""
        return stamp(seconds)

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        """The pieces of a prompt that show a slot: its time, and its tokens between the family's own marks."""
        raise NotImplementedError

    def vision_parts(self, network: Any) -> list[tuple[Any, str]]:
        """Where the vision tower and the projector are: owners and attribute names."""
        return [(network.model, "vision_tower"), (network.model, "multi_modal_projector")]

    def language_part(self, network: Any) -> tuple[Any, str]:
        """Where the language model is: its owner and the attribute's name."""
        return network.model, "language_model"


class AnySize(Family):
    """Qwen's models: pictures of any size, positions of three coordinates."""

    rows = 3

    def __init__(self, config: PreTrainedConfig, side: int | None = None):
        self._wanted = side or DEFAULT_SIDE
        super().__init__(config, side)

    def _native_side(self) -> int:
        return self._wanted

    @property
    def merge(self) -> int:
        """The side of the window of patches that becomes one token."""
        return int(self.config.vision_config.spatial_merge_size)

    @property
    def pixels(self) -> int:
        return self.native_side * int(self.config.vision_config.patch_size) * self.merge

    def _grid(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.config.vision_config
        clips = pixels[:, None].expand(-1, vision.temporal_patch_size, -1, -1, -1)
        rows = [[1, self.native_side * self.merge, self.native_side * self.merge]] * len(pixels)
        grid = torch.tensor(rows, device=pixels.device)
        return clip_patches(clips, vision.patch_size, self.merge), grid

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        patches, grid = self._grid(pixels)
        tokens = tokens_in(network.model.get_image_features(patches, grid))
        return tokens.reshape(len(pixels), self.native_side**2, self.width)

    def time(self, seconds: float) -> str:
        return f"{seconds:.1f} seconds"

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        return [f"<{time}><|vision_start|>" if time else "<|vision_start|>", tokens, "<|vision_end|>"]

    def vision_parts(self, network: Any) -> list[tuple[Any, str]]:
        return [(network.model, "visual")]


class Qwen25Vl(AnySize):
    """Qwen2.5-VL; Qwen2-VL is read in the same way."""

    title = "Qwen2.5-VL"


class Qwen3Vl(AnySize):
    """Qwen3-VL, whose tower also gives features to the first layers of the language model (DeepStack).

    They travel beside the tokens as further channels, so that selecting and merging treats both alike.
    """

    title = "Qwen3-VL"

    @property
    def channels(self) -> int:
        return self.width * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        patches, grid = self._grid(pixels)
        output = network.model.get_image_features(patches, grid)
        if isinstance(output, tuple):  # before Transformers 5.2
            pooled, deep = tokens_in(output[0]), output[1]
        else:
            pooled, deep = tokens_in(output), output.deepstack_features
        stacked = torch.cat([pooled, *(tokens_in(layer) for layer in deep)], dim=-1)
        return stacked.reshape(len(pixels), self.native_side**2, self.channels)


class SmolVlm(Family):
    """SmolVLM2, and SmolVLM."""

    title = "SmolVLM2"

    def _native_side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size // self.config.scale_factor)

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        tokens = tokens_in(network.model.get_image_features(pixel_values=pixels[:, None]))
        return tokens.reshape(len(pixels), self.native_side**2, self.width)

    def time(self, seconds: float) -> str:
        return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        mark = "<fake_token_around_image>"
        return [f"Frame from {time}:{mark}<global-img>", tokens, f"{mark}\n"]

    def vision_parts(self, network: Any) -> list[tuple[Any, str]]:
        return [(network.model, "vision_model"), (network.model, "connector")]

    def language_part(self, network: Any) -> tuple[Any, str]:
        return network.model, "text_model"


class LlavaOneVision(Family):
    """LLaVA-OneVision, which pools the tokens of videos and ends each with a learned newline."""

    title = "LLaVA-OneVision"

    def _native_side(self) -> int:
        vision = self.config.vision_config
        return math.ceil(int(vision.image_size) // int(vision.patch_size) / 2)

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        tokens = tokens_in(network.model.get_video_features(pixels[None]))
        frames = tokens.reshape(-1, self.width)[: len(pixels) * self.native_side**2]  # without the newline
        return frames.reshape(len(pixels), self.native_side**2, self.width)

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        return [f"{time}: ", tokens, NEWLINE_TOKEN, "\n"]


class InternVl(Family):
    """InternVL3, in the layout of Transformers (``-hf``)."""

    title = "InternVL3"

    def _native_side(self) -> int:
        vision = self.config.vision_config
        return int(_square(vision.image_size) // _square(vision.patch_size) * self.config.downsample_ratio)

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        return [f"Frame{number} ({time}): <img>", tokens, "</img>\n"]


class Gemma3(Family):
    """Gemma 3, whose attention runs in both directions among the tokens of a picture."""

    title = "Gemma 3"
    two_way = True

    def _native_side(self) -> int:
        return math.isqrt(self.config.mm_tokens_per_image)

    def frame(self, tokens: int, time: str, number: int) -> list[Piece]:
        return [f"{time}:\n\n<start_of_image>", tokens, "<end_of_image>\n\n"]


FAMILIES: dict[str, type[Family]] = {
    "qwen3_vl": Qwen3Vl,
    "qwen2_5_vl": Qwen25Vl,
    "qwen2_vl": Qwen25Vl,
    "smolvlm": SmolVlm,
    "llava_onevision": LlavaOneVision,
    "internvl": InternVl,
    "gemma3": Gemma3,
}
"""The families by Transformers' ``model_type``."""


def _square(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
