"""Any vision-language model of Transformers behind the interface of this project's own models.

The model keeps its weights and its ways; what is added is a memory in front of its language model. Only tensors here:
``vlm_families`` has what differs between models, ``vlm_processing`` the text, ``hub`` the loading.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_vstream.memory import MemorySnapshot, StarConfig, StarMemory, pool_grid
from flash_vstream.memory.frames import every_frame, whole_frames
from flash_vstream.models.interface import VIDEO_TOKEN, Memory
from flash_vstream.models.text_image import TextImagePair
from flash_vstream.models.vlm_families import NEWLINE_TOKEN, Family

LONGTERM_LENGTH = 256
"""Frames in the long-term memory of a model that is not told otherwise."""
NEWEST = 4
"""Newest frames that are read whole: reading just these is hard to beat (SimpleStream, 2026)."""
RECALLED = 4
"""Frames of the long-term memory that a question recalls."""
NEXT = "next_positions"
"""The attribute of a cache that holds the position after each of its rows; copies of a cache keep it."""


def default_star(side: int) -> StarConfig:
    """The memory of a model that was not trained with one: newest frames, and real frames to recall.

    Frames of more than 8x8 tokens are kept at half their side.
    """
    return StarConfig(
        spatial_size=side,
        spatial_length=NEWEST,
        temporal_size=1,
        abstract_size=1,
        temporal_length=0,
        abstract_length=0,
        retrieved_length=0,
        longterm_length=LONGTERM_LENGTH,
        longterm_size=side // 2 if side > 8 and side % 2 == 0 else side,
    )


@dataclass
class VlmConfig:
    """What the rest of the project needs to know of a Transformers model, and the sizes of its memory."""

    text_config: Any
    star: StarConfig
    recalled: int = RECALLED
    time_stamps: bool = True
    grounding_config: dict[str, Any] | None = None


class TransformersVlm(nn.Module):
    """A Transformers model that reads a memory (a ``StreamModel``).

    ``pair`` adds a text-image model, whose picture of each frame travels beside the frame's tokens.

    The positions of M-RoPE are ours, since the network keeps its own between calls, and two questions would then
    spoil each other's. They are the family's: a frame's tokens share one time, and what follows
    comes after its longer side.
    """

    frames_per_step = 1

    def __init__(
        self,
        network: PreTrainedModel,
        family: Family,
        star: StarConfig | None = None,
        pair: TextImagePair | None = None,
    ):
        super().__init__()
        self.network: Any = network
        self.family = family
        self.pair = pair
        self.attention_is_chosen = False
        self.config: Any = VlmConfig(network.config.get_text_config(), star or default_star(family.side))
        renamed = "cache" in inspect.signature(self.language_model.forward).parameters
        self._cache_name = "cache" if renamed else "past_key_values"

    @property
    def language_model(self) -> Any:
        """The network's own language model, without its head."""
        owner, name = self.family.language_part(self.network)
        return getattr(owner, name)

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.network.parameters())
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype  # type: ignore[no-any-return]

    @property
    def feature_shape(self) -> tuple[int, int]:
        """The shape ``(P², D)`` of an encoded frame."""
        return self.family.native_side**2, self.family.channels + self._pair_channels

    @property
    def _pair_channels(self) -> int:
        return 0 if self.pair is None else self.pair.channels(self.config.star.longterm_size)

    def drop_vision(self) -> None:
        """Free the vision tower, in a process that only answers."""
        for owner, name in self.family.vision_parts(self.network):
            setattr(owner, name, nn.Identity())
        if self.pair is not None:
            self.pair.drop_vision()

    def drop_language(self) -> None:
        """Free the language model, in a process that only watches."""
        owner, name = self.family.language_part(self.network)
        setattr(owner, name, nn.Identity())
        self.network.lm_head = nn.Identity()

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Tokens ``[B, P², D]`` of normalised pixels ``[B, 3, S, S]``, as the language model reads them."""
        pixels = pixel_values.to(self.device, self.dtype)
        tokens = self.family.encode(self.network, pixels)
        if self.pair is None:
            return tokens
        seen = self.pair.spread(pixel_values.to(self.device), self.family.native_side, self.config.star.longterm_size)
        return torch.cat([tokens, seen.to(tokens)], dim=2)

    def new_memory(
        self, dtype: torch.dtype | None = None, star: StarConfig | None = None, offline: bool = False
    ) -> Memory:
        """An empty memory for one stream. ``offline`` changes nothing: there is no released form of it."""
        star = star or self.config.star
        if star.abstract_length:  # needs a trained semantic attention
            star = replace(star, abstract_length=0)
        return StarMemory(star, self.feature_shape[1], None, dtype or self.dtype, self.device)

    def snapshot_of(
        self, features: Tensor, times: list[float], every: bool, star: StarConfig | None = None
    ) -> MemorySnapshot:
        """Each of the frames ``[n, P², D]`` as a whole slot, whether asked for ``every`` frame or not."""
        return every_frame(pool_grid(features, (star or self.config.star).spatial_size), times)

    def star_of(self, count: int) -> StarConfig:
        """The sizes of ``snapshot_of`` for up to ``count`` frames."""
        return whole_frames(self.config.star.spatial_size, count)

    def forward(
        self,
        input_ids: Tensor,
        memory_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, L, V]`` of ``input_ids``, whose visual tokens are those in ``memory_features [n, D]``.

        ``position_ids`` may be plain (``[B, L]``, counted in tokens) or M-RoPE's (``[3, B, L]``). With
        ``labels [B, L]`` (-100 for no label) the output has the mean loss. Raises ``ValueError`` unless the prompt has
        exactly one place for each visual token.
        """
        places = input_ids == VIDEO_TOKEN
        embeds, extra = self._embed(input_ids, places, memory_features)
        extra |= {self._cache_name: past_key_values, "attention_mask": attention_mask, **kwargs}
        extra["position_ids"] = self._positions(places, position_ids, attention_mask, past_key_values)
        output = self._read(embeds, places, extra)
        hidden = output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output.last_hidden_state
        logits = self.network.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, attentions=output.attentions)

    def _read(self, embeds: Tensor, places: Tensor, extra: dict[str, Any]) -> Any:
        if not self.family.two_way:
            return self.language_model(inputs_embeds=embeds, **extra)
        # The outer model composes the mask. Without a picture in these tokens, the causal one is right.
        pictures = {"token_type_ids": places.long()} if places.any() else {}
        return self.network.model(inputs_embeds=embeds, **pictures, **extra)

    def _embed(
        self, ids: Tensor, places: Tensor, memory_features: Sequence[Tensor] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings ``[B, L, width]`` with the visual tokens inserted, and what else their layers are given."""
        embeds: Tensor = self.network.get_input_embeddings()(ids.clamp_min(0))
        newlines = ids == NEWLINE_TOKEN
        if newlines.any():
            embeds = torch.where(newlines[..., None], self.network.model.image_newline.to(embeds), embeds)
        given = [features for features in memory_features or () if len(features)]
        count = sum(len(features) for features in given)
        if int(places.sum()) != count:
            raise ValueError(f"the prompt has {int(places.sum())} places for visual tokens, but {count} were given")
        if not count:
            return embeds, {}
        visual, extra = self._visual(torch.cat([features.to(embeds) for features in given]), places)
        return embeds.masked_scatter(places[..., None], visual), extra

    def _visual(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Visual tokens ``[n, D]`` as embeddings ``[n, width]``, and DeepStack's features of inner layers."""
        embeds, *deep = tokens[:, : self.family.channels].split(self.family.width, dim=1)
        return embeds, {"visual_pos_masks": places, "deepstack_visual_embeds": deep} if deep else {}

    def _positions(
        self, places: Tensor, given: Tensor | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor | None:
        """Positions for the language model; the cache keeps those that follow, one for each row.

        M-RoPE's own positions ``[3, B, L]`` are taken as they are. Plain ones count tokens: they only say that rows
        may be padded on the left, which is where ``mask [B, L']`` is 0.
        """
        if self.family.rows == 1:
            return given
        batch, length = places.shape
        if given is not None and given.ndim == 3:
            positions, following = given, [int(row[:, -1].max()) + 1 for row in given.unbind(1)]
        else:
            starts: list[int] = getattr(cache, NEXT, None) or [0 if cache is None else int(cache.get_seq_length())]
            starts = starts if len(starts) == batch else starts * batch  # a prefix that was repeated for its questions
            real = torch.ones_like(places)
            if given is not None and mask is not None:
                real = mask[:, -length:].bool()
            positions, following = torch.zeros(3, batch, length, dtype=torch.long, device=places.device), []
            for row, start in enumerate(starts):
                own, after = self._mrope(places[row][real[row]], start)
                positions[:, row, real[row]] = own.to(places.device)
                following.append(after)
        if cache is not None:
            setattr(cache, NEXT, following)
        return positions

    @staticmethod
    def _mrope(places: Tensor, start: int) -> tuple[Tensor, int]:
        """M-RoPE positions ``[3, L]`` of one prompt from position ``start`` on, and the position after it."""
        parts, at = [], start
        values, counts = torch.unique_consecutive(places.cpu(), return_counts=True)
        for visual, count in zip(values.tolist(), counts.tolist(), strict=True):
            if not visual:
                parts.append(torch.arange(at, at + count).expand(3, -1))
                at += count
                continue
            side = round(count**0.5)
            if side * side != count:
                raise ValueError(f"{count} visual tokens in a row are not a square grid")
            rows = torch.arange(side).repeat_interleave(side)
            parts.append(torch.stack([torch.zeros_like(rows), rows, torch.arange(side).repeat(side)]) + at)
            at += side
        return torch.cat(parts, 1), at
