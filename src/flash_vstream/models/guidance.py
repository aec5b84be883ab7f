"""Guidance: a description leans towards the words that fit the frame that it is about.

A small language model's descriptions are fluent, but it invents: it says what usually comes next. Grounding knows
better which words fit a frame. So before each token, the logits of the words that captions use are raised or lowered by
how much better, or worse, they fit this frame than a common picture. Together they keep their share of the probability,
so that the grammar of a sentence and its length are left to the language model.

This is not in the paper. It resembles classifier guidance of text (PPLM, arXiv 1912.02164; FUDGE, arXiv 2104.05218).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_vstream.memory import pool_grid
from flash_vstream.models.grounding import COMMON_SIDE, Grounder

SHARE = 0.7
"""The share of what grounding finds that is added to a word's logit."""
MOST = 3.0
"""Grounding is believed up to this many nats."""


class Guide:
    """Guides descriptions with a grounding and its vocabulary, as far as its words are single tokens."""

    def __init__(self, grounder: Grounder):
        self.grounder = grounder
        vocabulary = grounder.grounding.vocabulary
        rows = grounder.words.tokenizer([f" {word}" for word in vocabulary], add_special_tokens=False).input_ids
        tokens = {word: row[0] for word, row in zip(vocabulary, rows, strict=True) if len(row) == 1}
        self.tokens = torch.tensor(list(tokens.values()), dtype=torch.long)
        self._usual = torch.tensor([vocabulary[word] for word in tokens])
        self._words = grounder.grounding.read_vocabulary(grounder.words.embed_words(list(tokens)))

    @torch.inference_mode()
    def about(self, frame: Tensor) -> "Guided":
        """The guidance of a description of a frame ``[1, P², D]``."""
        grounding = self.grounder.grounding
        frame = pool_grid(frame, COMMON_SIDE)
        fits = grounding.word_fits(self._words, self.grounder.sights(frame))[:, 0].cpu() - self._usual
        return Guided(self.tokens, SHARE * fits.clamp(-MOST, MOST))


class Guided:
    """What is added to the logits of ``tokens [n]`` in one description."""

    def __init__(self, tokens: Tensor, added: Tensor):
        self._tokens, self._added = tokens, added

    def lean(self, logits: Tensor, said: Sequence[int]) -> Tensor:
        """The logits ``[V]`` that follow the tokens ``said``, leaning towards words that fit and were not said.

        Where an engine tells nothing but the likeliest token (vLLM), they stay as they are.
        """
        added = self._added
        if said:
            added = torch.where(torch.isin(self._tokens, torch.tensor(said)), added.clamp_max(0.0), added)
        before = logits[self._tokens]
        if not before.isfinite().any():
            return logits
        after = before + added
        leaning = logits.clone()
        leaning[self._tokens] = after + (before.logsumexp(0) - after.logsumexp(0))
        return leaning
