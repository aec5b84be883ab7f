"""Short answers: what the likeliest answers to a question about a frame are, by a small network.

What color the bus is, how many dogs there are, what he is holding: a language model of 135M parameters guesses such
answers from projected features no better than from the question alone. A network with cross-attention from the question
to the frame's tokens, trained as a classifier over frequent answers (as in the first systems for visual question
answering), does better. The language model reads its likeliest answer as a note after the question, and may know
better. The paper has nothing like it; models without ``short_answers_config`` go without.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NONE = ""
"""What the network answers to a question that asks for more than a few words."""
YES, NO = "yes", "no"
LONGEST = 32
"""Questions are truncated to this many tokens."""
SIDE = 4
"""The side of the grid on which places in a frame are learned."""
_ARTICLE = re.compile(r"^(?:a|an|the|some|in a|in the|on a|on the|at a) ")
_CHOICE = re.compile(r"(.+?),? or (.+)", re.DOTALL)
_LONGEST_CHOICE = 4


class ShortAnswers(nn.Module):
    """Logits of ``answers`` to questions about frames ``[B, P², channels]``.

    Questions are given as embeddings ``[B, L, text_width]``. One of the answers is ``NONE``, for questions that have no
    short answer.
    """

    def __init__(self, channels: int, text_width: int, answers: Sequence[str], width: int = 256, heads: int = 4):
        super().__init__()
        self.answers = list(answers)
        self.numbers = {answer: number for number, answer in enumerate(self.answers) if answer != NONE}
        self.words = nn.Linear(text_width, width)
        self.places = nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        self.context = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.sight = nn.Sequential(nn.LayerNorm(channels), nn.Dropout(0.2), nn.Linear(channels, width))
        self.grid = nn.Parameter(torch.randn(SIDE**2, width) * 0.02)
        self.look = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.pool = nn.Linear(width, 2)
        self.answer = nn.Sequential(
            nn.Linear(6 * width, 2 * width), nn.GELU(), nn.Dropout(0.4), nn.Linear(2 * width, len(self.answers))
        )

    def config(self) -> dict[str, Any]:
        """What the network's size depends on, as ``short_answers_config`` of a model."""
        return {"answers": self.answers, "width": self.places.shape[1]}

    def choice(self, question: str) -> list[int]:
        """The numbers of the two answers that a question names on both sides of "or"; empty if it does not.

        ``Is there a cat or a dog on the bed?`` names "cat" and "dog".
        """
        match = _CHOICE.match(" ".join(re.findall(r"[\w'-]+|,", question.lower())))
        if match is None:
            return []
        left, right = match[1].split(), match[2].split()
        lengths = range(_LONGEST_CHOICE, 0, -1)
        sides = ([" ".join(left[-n:]) for n in lengths], [" ".join(right[:n]) for n in lengths])
        plain = [map(without_article, side) for side in sides]
        found = [next((self.numbers[x] for x in side if x in self.numbers), None) for side in plain]
        return [number for number in found if number is not None] if None not in found else []

    def forward(self, embeddings: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        """Logits ``[B, V]``; ``mask [B, L]`` is False for padding."""
        embeddings, mask = embeddings[:, :LONGEST].to(self.words.weight), mask[:, :LONGEST]
        words = self.context(self.words(embeddings) + self.places[: embeddings.shape[1]], src_key_padding_mask=~mask)
        side = math.isqrt(features.shape[1])
        places = self.grid.T.unflatten(1, (SIDE, SIDE))[None]
        grid = nn.functional.adaptive_avg_pool2d(places, side)[0].flatten(1).T
        seen = nn.functional.gelu(self.sight(features.to(self.words.weight)) + grid)
        found, _ = self.look(words, seen, seen, need_weights=False)
        shares = self.pool(words).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        asked = torch.einsum("blk,blc->bkc", shares, torch.stack([words, found]).sum(0)).flatten(1)
        looked = torch.einsum("blk,blc->bkc", shares, found).flatten(1)
        logits: Tensor = self.answer(torch.cat([asked, looked, seen.mean(1), seen.amax(1)], -1))
        return logits


def without_article(text: str) -> str:
    """A short answer in lower case without the article, and the preposition before it, that it begins with."""
    return _ARTICLE.sub("", text)
