"""How well frames of the long-term memory fit a question, for models that were not trained to tell.

A ``QuestionFit`` can be replaced by a better one: ``pipeline.generator.fit = mine``.
"""

import re
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flash_vstream.memory import Slots

if TYPE_CHECKING:  # with it comes Transformers, whose import takes seconds
    from flash_vstream.models.text_image import TextImagePair

WORD = re.compile(r"[^\W_]+")
_UNTELLING_WORDS = """
a an and any are at be been before after can could did do does earlier ever far for from had has have how i in is it its
later many me much now of on one or so some something still tell that the them there they thing this time to was we
were what when where which who whom whose why will with you your see seen saw show shown video happen happened happening
describe
"""
UNTELLING = frozenset(_UNTELLING_WORDS.split())
"""Words of a question that say nothing about what a frame shows."""


class QuestionFit(Protocol):
    """Scores ``[n]`` of slots for a question; larger fits better. None: the question names nothing to look for."""

    def __call__(self, question: str, slots: Slots) -> Tensor | None: ...


def recalled(fit: QuestionFit, question: str, slots: Slots, count: int) -> Slots:
    """The ``count`` slots that fit a question best, in time order.

    A question that names nothing to look for ("What happened?") is shown slots spread evenly over the stream.
    """
    if len(slots) <= count:
        return slots
    scores = fit(question, slots)
    if scores is None:
        return slots[torch.linspace(0, len(slots) - 1, count).round().long()]
    return slots[torch.topk(scores.cpu(), count).indices.sort().values]


class PairFit:
    """The cosine between a question and what a text-image pair saw of each frame."""

    def __init__(self, pair: "TextImagePair"):
        self.pair = pair

    def __call__(self, question: str, slots: Slots) -> Tensor | None:
        """Scores ``[n]`` of slots that hold what the pair saw."""
        seen = self.pair.gather(slots.features)
        scores: Tensor = seen @ self.pair.read(question).to(seen)
        return scores


class WordFit:
    """Compares a question's words with a frame's tokens in the space of the language model's input embeddings.

    A projector is trained to put what a tower sees there, near the words for it; it is the model's own idea of
    similarity, if a rough one. A word's score for a frame is its best cosine over the frame's tokens; both
    sides are centred, since embeddings share a large common part. A frame's score is the mean over the words.
    """

    def __init__(self, table: Tensor, tokenizer: Any, width: int):
        self._table, self._tokenizer, self._width = table, tokenizer, width

    @torch.inference_mode()
    def __call__(self, question: str, slots: Slots) -> Tensor | None:
        """Scores ``[n]`` of slots whose first channels are the model's input embeddings."""
        words = [word for word in WORD.findall(question.lower()) if word not in UNTELLING]
        if not words:
            return None
        common = self._table[:: max(1, len(self._table) // 4096)].float().mean(0)
        rows = [self._tokenizer(f" {word}", add_special_tokens=False).input_ids for word in dict.fromkeys(words)]
        texts = torch.stack([self._table[ids].float().mean(0) - common for ids in rows if ids])
        tokens = slots.features[..., : self._width].to(self._table.device).float()
        tokens = tokens - tokens.mean((0, 1))
        scores: Tensor = normalize(texts, dim=1) @ normalize(tokens, dim=2).flatten(0, 1).T  # [words, n · tokens]
        best: Tensor = scores.unflatten(1, tokens.shape[:2]).amax(2)
        return best.mean(0)


def fit_of(model: Any, tokenizer: Any) -> QuestionFit | None:
    """The fit for a Transformers model: its text-image pair, if it has one, else its own embeddings.

    None for a model that locates what a question names itself.
    """
    pair = getattr(model, "pair", None)
    if pair is not None:
        return PairFit(pair)
    family = getattr(model, "family", None)
    if family is None:
        return None
    return WordFit(model.network.get_input_embeddings().weight, tokenizer, family.width)
