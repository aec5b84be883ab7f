"""Flash-VStream as a Transformers model.

This module handles only tensors: pixels to features, features to memory tokens, tokens to logits. The
processor handles text and its layout; other packages handle files, threads and processes.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_vstream.errors import UserError
from flash_vstream.memory import SemanticAttention
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.grounding import Grounding
from flash_vstream.models.remote_code import AUTO_MAP, write_module
from flash_vstream.models.short_answers import ShortAnswers
from flash_vstream.models.sight import Sight
from flash_vstream.models.stream_parts import Projector, StreamParts


class FlashVStreamPreTrainedModel(PreTrainedModel):
    """The class attributes that Transformers expects from a family of models."""

    config: FlashVStreamConfig
    config_class = FlashVStreamConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class FlashVStreamForConditionalGeneration(StreamParts, FlashVStreamPreTrainedModel, GenerationMixin):
    """Vision tower, semantic attention, projector and causal language model (arXiv 2406.08085, figure 2).

    ``encode`` turns pixels into the feature maps that are written to a stream's memory
    (``new_memory``). A prompt has ``config.video_token_id`` in place of each visual token, and
    ``memory_features`` holds those tokens.
    """

    _no_split_modules = ["CLIPEncoderLayer", "LlamaDecoderLayer"]
    # Grounding and sight compare scores that are close together, and float32 costs almost nothing there.
    _keep_in_fp32_modules_strict = ["grounding", "sight", "short_answers"]
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config: FlashVStreamConfig):
        super().__init__(config)
        channels = config.vision_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.semantic_attention = SemanticAttention(channels, config.attention_hidden_size)
        self.projector = Projector(channels, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # Transformers 5 renamed this argument in a minor release, and warns about the old name.
        renamed = "cache" in inspect.signature(self.language_model.forward).parameters
        self._cache_name = "cache" if renamed else "past_key_values"
        self.grounding = (
            Grounding(channels, config.text_config.hidden_size, **config.grounding_config)
            if config.grounding_config is not None
            else None
        )
        self.sight = Sight(channels, **config.sight_config) if config.sight_config is not None else None
        self.short_answers = (
            ShortAnswers(channels, config.text_config.hidden_size, **config.short_answers_config)
            if config.short_answers_config is not None
            else None
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as Transformers does, in a form that its Auto classes can load (``remote_code``)."""
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, *args, **kwargs)
        write_module(Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_output_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        memory_features: Sequence[Tensor] | None = None,
        abstract_frames: Sequence[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        picture_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, L, V]`` and, with ``labels [B, L]`` (-100 for no label), the mean loss.

        Visual tokens are given in ``memory_features``, or made from pictures (``remember``). Other keywords (such as
        ``logits_to_keep``) are passed to the language model. In training mode with labels, logits are computed only at
        labelled positions and are not returned: over the whole vocabulary they would take up most of a small model's
        memory.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            if pixel_values is not None:
                inputs_embeds = self._embed_pictures(input_ids, pixel_values, picture_counts)
            else:
                inputs_embeds = self.embed(input_ids, memory_features, abstract_frames)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if past_key_values is not None:
            kwargs[self._cache_name] = past_key_values  # generate passes it in kwargs, by its new name
        if self.training and labels is not None:
            return CausalLMOutputWithPast(loss=self._labelled_loss(inputs_embeds, labels, **kwargs) + self._untouched())
        output: CausalLMOutputWithPast = self.language_model(inputs_embeds=inputs_embeds, labels=labels, **kwargs)
        return output

    def _labelled_loss(
        self, embeds: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        """Cross entropy over labelled positions only."""
        decoder = self.language_model.get_decoder()
        hidden = decoder(inputs_embeds=embeds, **{"use_cache": False, **kwargs}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        labelled = targets != -100
        logits = self.get_output_embeddings()(hidden[labelled]).float()
        total = nn.functional.cross_entropy(logits, targets[labelled], reduction="sum")
        count = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return total / count.clamp_min(1).to(total.device)  # a batch of unreadable media has no labels

    def _untouched(self) -> Tensor | float:
        """Zero, with gradients of zero for everything of ours that is trained.

        A batch of text has no use for the projector, and one of short streams none for semantic attention. With
        gradients all the same, a step works on any batch, and all processes reduce the same gradients.
        """
        own = [*self.projector.parameters(), *self.semantic_attention.parameters()]
        parts = [parameter.sum() for parameter in own if parameter.requires_grad]
        return 0.0 * torch.stack(parts).sum() if parts else 0.0

    def remember(self, pixel_values: Tensor, picture_counts: Tensor) -> list[Tensor]:
        """Visual tokens ``[n, D]`` of each sample's pictures, remembered as a stream of one picture a second.

        ``pixel_values [N, 3, H, W]`` are the pictures of all samples, ``picture_counts [B]`` how many belong to each.
        """
        tokens = []
        for features in self.encode(pixel_values).split(picture_counts.tolist()):
            if not len(features):
                tokens.append(features.flatten(0, 1))
                continue
            memory = self.new_memory(features.dtype)
            memory.write(features, [float(second) for second in range(len(features))])
            tokens.append(memory.read().tokens())
        return tokens

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Transformers' ``generate``, for prompts with visual tokens.

        The first step reads embeddings, so whatever looks at the ids of a prompt (such as a repetition penalty) sees
        padding in place of visual tokens. With ``prefill_chunk_size`` the prompt is read before. Raises ``UserError``
        for prompt look-up decoding, which reads ids alone.
        """
        ids: Tensor | None = kwargs.pop("input_ids", inputs)
        pictures = {name: kwargs.pop(name, None) for name in ("pixel_values", "picture_counts", "memory_features")}
        places = None if ids is None else ids == self.config.video_token_id
        if ids is None or places is None or not places.any():
            return super().generate(ids, **kwargs)
        embeds = self._embed_pictures(ids, **pictures)
        settings = kwargs.get("generation_config") or self.generation_config
        chunk = kwargs.pop("prefill_chunk_size", None) or getattr(settings, "prefill_chunk_size", None)
        if kwargs.get("prompt_lookup_num_tokens") or getattr(settings, "prompt_lookup_num_tokens", None):
            raise UserError("prompt look-up decoding cannot read visual tokens; leave out prompt_lookup_num_tokens")
        if chunk:
            kwargs[self._cache_name] = self._read_prompt(embeds, kwargs.get("attention_mask"), chunk)
        else:
            kwargs["inputs_embeds"] = embeds
        output: Any = super().generate(ids.masked_fill(places, self.config.pad_token_id or 0), **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        repeated = places.repeat_interleave(len(sequences) // len(places), 0)
        sequences[:, : places.shape[1]].masked_fill_(repeated, self.config.video_token_id)
        return output

    def _read_prompt(self, embeds: Tensor, mask: Tensor | None, chunk: int) -> Cache:
        """A cache of all but the last of ``embeds [B, L, width]``, read ``chunk`` at a time."""
        cache: Cache = DynamicCache(config=self.language_model.config)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        positions, end = (mask.cumsum(1) - 1).clamp_min(0), 0
        for part in embeds[:, :-1].split(chunk, 1):
            begin, end = end, end + part.shape[1]
            self(
                inputs_embeds=part,
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache

    def _embed_pictures(
        self,
        ids: Tensor,
        pixel_values: Tensor | None = None,
        picture_counts: Tensor | None = None,
        memory_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """``embed``, with the visual tokens or the pictures that they come from."""
        if pixel_values is not None:
            counts = torch.tensor([len(pixel_values)]) if picture_counts is None else picture_counts
            memory_features = self.remember(pixel_values, counts)
        return self.embed(ids, memory_features)
