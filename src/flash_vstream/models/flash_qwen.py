"""Flash-VStream-Qwen (arXiv 2506.23825): Qwen2-VL with a flash memory before its merger.

A frame is encoded twice, at full and at half resolution. The Context Synopsis Memory (CSM) clusters the low-resolution
maps of the whole stream; the Detail Augmentation Memory (DAM) keeps the high resolution of the frames that represent
its heaviest clusters. That is the temporal and the retrieved memory of STAR, so a snapshot has them there. Qwen2-VL
itself is Transformers', unchanged; AM-RoPE gives the tokens their positions (``am_rope``).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import Qwen2VLConfig

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, StarConfig
from flash_vstream.memory.flash import FlashMemory, join_resolutions
from flash_vstream.memory.flash_release import ReleaseFlashMemory, ReleaseSnapshot
from flash_vstream.models.am_rope import VisualPositions, am_rope, real_time_positions, release_am_rope, steps_of
from flash_vstream.models.interface import VIDEO_TOKEN, Layout, Memory
from flash_vstream.models.vlm import TransformersVlm
from flash_vstream.models.vlm_families import AnySize, clip_patches
from flash_vstream.models.vlm_processing import VlmProcessor

MODEL_TYPE = "flash_vstream_qwen2_vl"
SIDE = 16
"""The side of a frame's grid of tokens at 448 x 448 pixels, the most that the model was trained with."""


def flash_star(values: dict[str, Any], side: int = SIDE) -> StarConfig:
    """The sizes of the memory from a checkpoint's ``flash_memory_config``, which counts two frames to a step.

    Raises ``UserError`` for methods other than the published ones.
    """
    methods = {"flash_memory_temporal_method": "kmeans_ordered", "flash_memory_spatial_method": "klarge_retrieve"}
    for name, published in {**methods, "flash_memory_temporal_poolsize": 2}.items():
        if values.get(name, published) != published:
            raise UserError(f"{name} is {values[name]!r}; only the published {published!r} can be used")
    temporal = int(values.get("flash_memory_temporal_length", 120)) // 2
    return StarConfig(
        spatial_size=side,
        temporal_size=side // 2,
        abstract_size=1,
        spatial_length=0,
        temporal_length=temporal,
        abstract_length=0,
        retrieved_length=min(int(values.get("flash_memory_spatial_length", 60)) // 2, temporal),
    )


class FlashQwenFamily(AnySize):
    """How frames are encoded: the tower's tokens before the merger, at two resolutions."""

    title = "Flash-VStream-Qwen"

    @property
    def channels(self) -> int:
        """Four tokens that the merger joins, and a quarter of four at low resolution."""
        return 5 * int(self.config.vision_config.embed_dim)

    def encode(self, network: Any, pixels: Tensor) -> Tensor:
        return self.encode_clips(network, pixels[:, None].expand(-1, 2, -1, -1, -1))

    def encode_clips(self, network: Any, clips: Tensor) -> Tensor:
        """Steps ``[B, P, channels]`` of normalised clips of two frames ``[B, 2, 3, H, W]``, as the release pairs them.

        P is the number of tokens that the language model reads of a step in high resolution.
        """
        high = self._before_merger(network, clips)
        low = self._before_merger(network, avg_pool2d(clips.flatten(0, 1), 2).unflatten(0, clips.shape[:2]))
        return join_resolutions(high, low)

    def _before_merger(self, network: Any, clips: Tensor) -> Tensor:
        vision = self.config.vision_config
        rows, columns = clips.shape[3] // vision.patch_size, clips.shape[4] // vision.patch_size
        grid = torch.tensor([[1, rows, columns]] * len(clips), device=clips.device)
        patches = clip_patches(clips, vision.patch_size, self.merge)
        hidden: Tensor = network.model.visual(patches, grid_thw=grid).last_hidden_state
        return hidden.reshape(len(clips), rows * columns // 4, -1)


class FlashVStreamQwen(TransformersVlm):
    """Flash-VStream-Qwen as a ``StreamModel``; ``compat="release"`` in its ``StarConfig`` is the released behaviour."""

    family: FlashQwenFamily
    frames_per_step = 2

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Steps ``[B, P², D]`` of normalised pixels: single frames ``[B, 3, S, S]``, or pairs ``[B, 2, 3, S, S]``."""
        pixels = pixel_values.to(self.device, self.dtype)
        if pixels.ndim == 4:
            return self.family.encode(self.network, pixels)
        return self.family.encode_clips(self.network, pixels)

    def new_memory(
        self, dtype: torch.dtype | None = None, star: StarConfig | None = None, offline: bool = False
    ) -> Memory:
        """An empty memory for one stream; ``offline`` gives the release's form for whole videos."""
        star, channels, dtype = star or self.config.star, self.family.channels, dtype or self.dtype
        if star.compat == "release":
            return ReleaseFlashMemory(star, channels, dtype, self.device, offline)
        return FlashMemory(star, channels, None, dtype, self.device)

    def snapshot_of(
        self, features: Tensor, times: list[float], every: bool, star: StarConfig | None = None
    ) -> MemorySnapshot:
        """A snapshot of a memory that saw only these frames; with ``every``, one that has a slot for each."""
        star = star or self.config.star
        if every:
            star = replace(star, temporal_length=len(times), retrieved_length=len(times), compat="none")
        memory = self.new_memory(features.dtype, star, offline=True)
        memory.write(features, times)
        return memory.read()

    def star_of(self, count: int) -> StarConfig:
        """The sizes of ``snapshot_of``: the model's own, since it was trained to read its memory."""
        return self.config.star  # type: ignore[no-any-return]

    def _visual(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Any]]:
        # Each row holds the four tokens of one window side by side, which is how the merger reads them.
        return self.network.model.visual.merger(tokens.reshape(-1, tokens.shape[1] // 4)), {}

    def drop_vision(self) -> None:
        """Free the tower's blocks; the merger belongs to reading."""
        self.network.model.visual.blocks = torch.nn.ModuleList()
        self.network.model.visual.patch_embed = torch.nn.Identity()


class FlashQwenProcessor(VlmProcessor):
    """Prompts of Flash-VStream-Qwen: all visual tokens in one run, without times in text, details first."""

    def lay_out(self, snapshot: MemorySnapshot | None, time_stamps: bool = True, cue: str = "") -> Layout:
        """The prompt up to its question, with AM-RoPE's positions. ``time_stamps`` changes nothing."""
        opening = self.tokenize(self.template.first_question.partition("{}")[0])
        if snapshot is None:
            return Layout(opening, None, torch.full((len(opening),), -1))
        before = [*opening, *self.tokenize("<|vision_start|>", first=False)]
        after = self.tokenize("<|vision_end|>", first=False)
        details, context = snapshot.retrieved, snapshot.temporal
        placed = visual_positions(snapshot, len(before))
        counted = [
            (torch.arange(len(part)) + first).repeat_interleave(part.features.shape[1])
            for part, first in ((details, len(context)), (context, 0))  # numbered in the order of the parts
        ]
        slots = torch.cat([torch.full((len(before),), -1), *counted, torch.full((len(after),), -1)])
        texts = [torch.arange(len(before)), torch.arange(len(after)) + placed.following]
        positions = torch.cat([texts[0].expand(3, -1), placed.positions, texts[1].expand(3, -1)], 1)
        features = torch.cat([details.features.flatten(0, 1), context.features.flatten(0, 1)])
        return Layout([*before, *[VIDEO_TOKEN] * len(features), *after], features, slots, positions)

    def longest_layout(self, config: Any) -> int:
        """The positions up to the question, for a full memory."""
        opening = self.tokenize(self.template.first_question.partition("{}")[0])
        return len(opening) + 2 + int(config.star.max_tokens)


def visual_positions(snapshot: MemorySnapshot, start: int) -> VisualPositions:
    """AM-RoPE for a snapshot whose first visual token stands at ``start``.

    True times place a frame between the first and the last of the stream. The release counts steps instead, and gives
    the synopsis the places of its members in the window that it last clustered.
    """
    details, context = snapshot.retrieved, snapshot.temporal
    grids = [2 * (math.isqrt(part.features.shape[1]),) for part in (details, context)]
    if isinstance(snapshot, ReleaseSnapshot):
        if snapshot.real_time:
            return real_time_positions(len(details), grids[0], len(context), grids[1], start)
        return release_am_rope(details.mean, grids[0], context.mean, grids[1], start)
    first = float(context.start.min())
    steps = [steps_of(part.mean, first, snapshot.time, snapshot.frames) for part in (details, context)]
    return am_rope(steps[0], grids[0], steps[1], grids[1], start)


def flash_qwen_config(values: dict[str, Any]) -> Qwen2VLConfig:
    """Transformers' configuration of Qwen2-VL from a published ``config.json``."""
    config = Qwen2VLConfig.from_dict({**values, "model_type": "qwen2_vl"})
    assert isinstance(config, Qwen2VLConfig)
    return config
