"""The projector's first lesson: the words of a picture's captions, without the language model.

A projector that starts at random shows a language model noise, and everything behind it must be
learnt through thirty layers. Here it learns first to put a picture's visual tokens near the embeddings
of the words that people use of the picture, so that the language model meets something like words
from the first step on. That needs the embeddings and no more of the language model: minutes, where
the same through the whole model takes hours.

A word is present in a picture as surely as captions have it (of five captions, in how many). The
tokens of a picture divide the words among themselves: what counts is the soft maximum over them. A
bias for each word takes up how frequent it is, which leaves the evidence to the tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flash_vstream.memory import pool_grid
from flash_vstream.train.captions import PictureSet
from flash_vstream.train.events import content_words

BATCH = 128
LEARNING_RATE = 1.5e-3
LEAST_CAPTIONS = 8
"""A word is learnt when so many captions have it."""
KEPT_CHANNELS = 0.9
"""Channels that are kept of a picture's features at each step; a few thousand pictures are soon known by heart."""
Report = Callable[[str], object]


class WordTargets:
    """The words of a picture set: unit embeddings ``[W, width]`` around their mean, and who has which."""

    def __init__(self, captions: dict[str, list[str]], tokenizer: Any, embeddings: Tensor):
        counts = Counter(word for texts in captions.values() for text in texts for word in set(content_words(text)))
        self.words = sorted(word for word, count in counts.items() if count >= LEAST_CAPTIONS)
        self._index = {word: i for i, word in enumerate(self.words)}
        rows = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in self.words]
        known = torch.stack([embeddings[row].float().mean(0) for row in rows])
        self.mean = known.mean(0)
        self.radius = float((known - self.mean).norm(dim=1).mean())
        self.directions = nn.functional.normalize(known - self.mean, dim=1)

    def of(self, captions: Sequence[str]) -> Tensor:
        """The share of the captions that have each word, ``[W]``."""
        shares = torch.zeros(len(self.words))
        for text in captions:
            rows = [self._index[word] for word in set(content_words(text)) if word in self._index]
            shares[rows] += 1 / len(captions)
        return shares


def align(
    projector: nn.Module,
    embeddings: Tensor,
    tokenizer: Any,
    pictures: PictureSet,
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """Teach ``projector`` the words of ``pictures``, in place, for grids of 4x4, 2x2 and one token.

    ``embeddings`` is the language model's input table ``[V, width]``. Afterwards a visual token lies
    about as far from the words' mean as words do.
    """
    torch.manual_seed(seed)
    keys = sorted(pictures.captions)
    targets = WordTargets(pictures.captions, tokenizer, embeddings)
    shares = torch.stack([targets.of(pictures.captions[key]) for key in keys])
    with safe_open(pictures.path, "pt") as file:
        features = torch.stack([file.get_tensor(key) for key in keys])  # [N, VIEWS, P², D], float16
    scale = nn.Parameter(torch.tensor(math.log(12.0)))
    bias = nn.Parameter(torch.logit(shares.mean(0).clamp(1e-5, 1 - 1e-5)))
    groups = [
        {"params": [*projector.parameters()], "weight_decay": 0.05},
        {"params": [scale, bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(keys)).tolist()
        rows, order = torch.tensor(order[:BATCH]), order[BATCH:]
        view = torch.randint(0, features.shape[1], (len(rows),))
        shown = features[rows, view].float()
        shown = shown * (torch.rand(len(rows), 1, shown.shape[-1]) < KEPT_CHANNELS) / KEPT_CHANNELS
        loss = _loss(projector, shown, shares[rows], targets, scale, bias)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            report(f"aligning the projector with words: step {step + 1} of {steps}, loss {loss.item():.2f}")
    with torch.no_grad():
        last: Any = list(projector.modules())[-1]
        last.bias += targets.mean.to(last.bias)


def _loss(
    projector: nn.Module, features: Tensor, shares: Tensor, targets: WordTargets, scale: Tensor, bias: Tensor
) -> Tensor:
    """Cross entropy of every word, a mean over grids, and a pull of tokens to the words' distance."""
    side = math.isqrt(features.shape[1])
    losses = []
    while side:
        tokens = projector(pool_grid(features, side)) / targets.radius  # [B, side², width]
        evidence = (scale.exp() * tokens @ targets.directions.T).logsumexp(1) - math.log(side**2)
        words = nn.functional.binary_cross_entropy_with_logits(evidence + bias, shares, reduction="sum")
        losses.append(words / len(features) + 4 * (tokens.norm(dim=-1) - 1).square().mean())
        side //= 2
    return torch.stack(losses).mean()
