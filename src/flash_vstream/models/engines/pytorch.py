"""The reference engine: the Transformers model as it is, on any device."""

import copy
from collections.abc import Sequence as Seq
from typing import Any

import torch
from transformers import DynamicCache

from flash_vstream.models.engines.base import CHUNK_TOKENS, Feed, Row
from flash_vstream.models.half_linear import add_float16_copies


class CacheSequence:
    """A sequence in a Transformers cache."""

    def __init__(self, cache: Any):
        self.cache = cache

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return int(self.cache.get_seq_length())


class PyTorchEngine:
    """Runs a model's language model through Transformers, one sequence after another."""

    name = "pytorch"

    def __init__(self, model: Any):
        self.model = model
        if model.device.type == "cpu":
            # Only eager attention returns its weights, and on a CPU it is also the fastest for decoding, which
            # processes one token at a time.
            model.language_model.set_attn_implementation("eager")
            if model.dtype == torch.float32:
                add_float16_copies(model.language_model)
        self._returns_attention = model.language_model.config._attn_implementation == "eager"

    def new_sequence(self) -> CacheSequence:
        """An empty sequence."""
        return CacheSequence(DynamicCache(config=self.model.language_model.config))

    def fork(self, sequence: CacheSequence) -> CacheSequence:
        """A copy of ``sequence``."""
        return CacheSequence(copy.deepcopy(sequence.cache))

    @torch.inference_mode()
    def step(self, feeds: Seq[Feed], attention: bool = False) -> list[Row]:
        """See ``Engine.step``."""
        return [self._read(feed, attention and self._returns_attention) for feed in feeds]

    def _read(self, feed: Feed, attention: bool) -> Row:
        chunks = feed.embeddings[None].split(CHUNK_TOKENS, dim=1)
        for chunk in chunks:
            output = self.model(
                inputs_embeds=chunk,
                past_key_values=feed.sequence.cache,
                use_cache=True,
                logits_to_keep=1,
                output_attentions=attention and chunk is chunks[-1],
            )
        paid = None
        if attention:
            paid = torch.stack([layer[0, :, -1].float().mean(0) for layer in output.attentions]).sum(0).cpu()
        return Row(output.logits[0, -1].float(), paid)
