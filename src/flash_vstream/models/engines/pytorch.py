"""The reference engine: the Transformers model as it is, on any device."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_vstream.models.engines.base import CHUNK_TOKENS, Feed, Row
from flash_vstream.models.interface import StreamModel

if TYPE_CHECKING:  # its import takes seconds, and OpenVINO does without
    from transformers import DynamicCache


class PyTorchEngine:
    """Runs a model through Transformers, one sequence after another. A sequence is a Transformers cache."""

    name, together = "pytorch", False

    def __init__(self, model: StreamModel):
        self.model = model
        # Only eager attention returns its weights, and on a CPU it is also the fastest for decoding,
        # which processes one token at a time.
        if model.device.type == "cpu" and not model.attention_is_chosen:
            model.language_model.set_attn_implementation("eager")
        self._returns_attention = model.language_model.config._attn_implementation == "eager"

    def new_sequence(self) -> "DynamicCache":
        """An empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.language_model.config)

    def fork(self, sequence: "DynamicCache") -> "DynamicCache":
        """A copy of the cache."""
        return copy.deepcopy(sequence)

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> list[Row]:
        """See ``Engine.step``."""
        return [self._read(feed) for feed in feeds]

    def _read(self, feed: Feed) -> Row:
        attention = feed.attention and self._returns_attention
        ids = list(feed.ids)
        while feed.features is None and len(ids) - CHUNK_TOKENS >= feed.keep:
            self._forward(feed, ids[:CHUNK_TOKENS], keep=1)
            ids = ids[CHUNK_TOKENS:]
        output = self._forward(feed, ids, feed.keep, attention)
        paid = self._paid(output.attentions, feed.sequence.get_seq_length()) if attention else None
        return Row(output.logits[0, -feed.keep :].float().cpu(), paid)

    def _forward(self, feed: Feed, ids: list[int], keep: int, attention: bool = False) -> Any:
        model: Any = self.model
        return model(
            input_ids=torch.tensor([ids], device=model.device),
            memory_features=[] if feed.features is None else [feed.features],
            position_ids=None if feed.positions is None else feed.positions[:, None].to(model.device),
            past_key_values=feed.sequence,
            use_cache=True,
            logits_to_keep=keep,
            output_attentions=attention,
        )

    def _paid(self, layers: Sequence[Tensor], length: int) -> Tensor:
        """The attention ``[length]`` of the last token, from each layer's ``[1, heads, L, T]``."""
        total = torch.zeros(length)
        for layer in layers:
            paid = layer[0, :, -1].float().mean(0).cpu()
            total[length - len(paid) :] += paid  # fewer than all where a layer's window is sliding
        return total
