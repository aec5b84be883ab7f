"""What Flash-VStream does besides language: frames to features, features to memory tokens. Needs no Transformers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flash_vstream.memory import (
    MemorySnapshot,
    SemanticAttention,
    StarConfig,
    StarMemory,
    abstract_memory,
    pool_grid,
)
from flash_vstream.memory.frames import every_frame
from flash_vstream.memory.release import ReleaseMemory


class Projector(nn.Sequential):
    """The two-layer MLP from feature channels to the language model's width (``mlp2x_gelu``)."""

    def __init__(self, channels: int, width: int):
        super().__init__(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))


class StreamParts:
    """A vision tower, semantic attention and projector around a language model's input embeddings."""

    config: Any
    vision_tower: Any
    semantic_attention: SemanticAttention
    projector: Projector
    attention_is_chosen = False
    frames_per_step = 1
    if TYPE_CHECKING:
        language_model: Any
        dtype: torch.dtype

        def get_input_embeddings(self) -> nn.Module: ...

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pooled feature maps ``[B, pooled_size², D]`` of pixels ``[B, 3, H, W]``, without gradients."""
        with torch.no_grad():
            return pool_grid(self.encode_patches(pixel_values), self.config.pooled_size)

    def encode_patches(self, pixel_values: Tensor) -> Tensor:
        """The tower's patch features ``[B, P², D]`` before pooling (the released code's ``encode_images``)."""
        layer = self.config.vision_feature_layer
        pixel_values = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype)
        features: Tensor
        if layer is None:
            features = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        else:
            features = self.vision_tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[layer]
        return features[:, 1:] if self.config.vision_has_class_token else features

    @property
    def feature_shape(self) -> tuple[int, int]:
        """The shape ``(P², D)`` of an encoded frame."""
        return self.config.pooled_size**2, self.config.vision_config.hidden_size

    def new_memory(
        self, dtype: torch.dtype | None = None, star: StarConfig | None = None, offline: bool = False
    ) -> StarMemory | ReleaseMemory:
        """An empty memory for one stream, of the configured sizes or those in ``star``, on the model's device.

        ``offline`` gives the released form for whole videos, if the memory is the released one.
        """
        star, channels, device = star or self.config.star, self.feature_shape[1], self._projector_weight.device
        if star.compat == "release":
            return ReleaseMemory(star, channels, self.semantic_attention, dtype or self.dtype, device, offline)
        return StarMemory(star, channels, self.semantic_attention, dtype or self.dtype, device)

    def snapshot_of(
        self, features: Tensor, times: list[float], every: bool, star: StarConfig | None = None
    ) -> MemorySnapshot:
        """A snapshot of a memory that saw only frames ``[n, P², D]``; with ``every``, of these frames themselves."""
        if every:
            return every_frame(pool_grid(features, (star or self.config.star).spatial_size), times)
        memory = self.new_memory(features.dtype, star, offline=True)
        memory.write(features, times)
        return memory.read()

    def star_of(self, count: int) -> StarConfig:
        """The sizes of ``snapshot_of``: the model's own, since it was trained to read its memory."""
        star: StarConfig = self.config.star
        return star

    def drop_vision(self) -> None:
        """Free the vision tower, in a process that only answers."""
        self.vision_tower = nn.Identity()

    def drop_language(self) -> None:
        """Free the language model, in a process that only watches."""
        self.language_model = nn.Identity()

    @property
    def _projector_weight(self) -> Tensor:
        return next(self.projector.parameters())

    def embed(
        self,
        input_ids: Tensor,
        memory_features: Sequence[Tensor] | None = None,
        abstract_frames: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings ``[B, L, width]`` of ``input_ids``, with the visual tokens inserted.

        ``memory_features`` holds each sample's visual tokens ``[n, D]`` in reading order (an empty
        tensor for none). ``abstract_frames`` is for training: each sample's frames ``[T, P_abs², D]``,
        whose abstract memory is computed here, with gradients, and put first. Raises ``ValueError``
        unless the prompt has exactly one place per visual token.
        """
        places = input_ids == self.config.video_token_id
        embeds: Tensor = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        tokens = self._memory_tokens(memory_features, abstract_frames)
        if int(places.sum()) != len(tokens):
            raise ValueError(
                f"the prompt has {int(places.sum())} places for visual tokens, but {len(tokens)} were given"
            )
        if len(tokens) == 0:
            return embeds
        projected = self.projector(tokens).to(embeds)
        return embeds.masked_scatter(places[..., None], projected)

    def _memory_tokens(
        self, memory_features: Sequence[Tensor] | None, abstract_frames: Sequence[Tensor] | None
    ) -> Tensor:
        channels = self.config.vision_config.hidden_size
        tokens = [self._projector_weight.new_zeros(0, channels)]
        star = self.config.star
        for i, features in enumerate(memory_features or ()):
            if abstract_frames is not None and len(abstract_frames[i]):
                frames = abstract_frames[i].to(tokens[0])
                memory = abstract_memory(frames, star.abstract_length, self.semantic_attention, star.update_ratio)
                tokens.append(memory.flatten(0, 1))
            if len(features):  # plain chat has no tokens, and its empty tensor may have any number of channels
                tokens.append(features.to(tokens[0].device))
        return torch.cat([part.to(tokens[0].dtype) for part in tokens])
