"""Training samples: feature streams with questions, mixed and collated into batches."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, Slots, StarConfig, StarMemory, pool_grid
from flash_vstream.models.grounding import Mention
from flash_vstream.models.hints import Hinter
from flash_vstream.models.interface import Layout
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.synthetic.captions import PictureSet, play
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle, plan_stream
from flash_vstream.synthetic.questions import Turn
from flash_vstream.train.packing import Packed, collate, pack

UNSURE = 0.25
"""In questions about two events, the probability that a note marks an event as unseen."""
ATTEMPTS = 50
"""How many streams are composed for a sample, in case there is nothing to ask about the first ones."""


@dataclass(frozen=True)
class Sample:
    """A stream and the questions about it: ``features [T, P², D]``, ``times [T]`` and turns.

    ``features`` is None for plain chat. With ``independent``, each turn sees only the stream;
    otherwise the turns form one dialogue. ``problem`` says why the sample could not be read; it is then
    left out of its batch's loss.
    """

    features: Tensor | None
    times: Tensor
    turns: tuple[Turn, ...]
    independent: bool = True
    problem: str = ""


class StreamSamples(Dataset[Sample]):
    """Streams composed on the fly from a picture set; sample ``i`` depends only on ``seed`` and ``i``.

    ``styles`` are ``(share, style)`` pairs, and ``ask`` makes the turns for a plan. Each run of
    ``batch`` consecutive samples shares a style, so the sequences in a batch have similar lengths:
    padding short ones to the length of long ones used to cost half of a step.
    """

    def __init__(
        self,
        pictures: PictureSet,
        styles: Sequence[tuple[float, StreamStyle]],
        ask: Callable[[StreamPlan, random.Random], list[Turn]],
        length: int,
        seed: str,
        batch: int = 1,
    ):
        self.pictures = pictures
        self.keys = sorted(pictures.captions)
        self.styles = list(styles)
        self.ask = ask
        self.length = length
        self.seed = seed
        self.batch = batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{index}")
        shares, styles = zip(*self.styles, strict=True)
        style = random.Random(f"{self.seed}/batch {index // self.batch}").choices(styles, shares)[0]
        for _ in range(ATTEMPTS):
            plan = plan_stream(self.keys, style, rng)
            if turns := self.ask(plan, rng):
                features, times = play(plan, self.pictures)
                return Sample(features, times, tuple(turns))
        raise UserError(f"{ATTEMPTS} streams in a row allow no question; give the source other kinds or longer streams")


class Mixture(Dataset[Sample]):
    """Several sources as one dataset, to be read in order: each run of ``batch`` samples has one source.

    Sources are drawn in proportion to ``shares``. A finite source is read in an order of its own,
    reshuffled for each epoch.
    """

    def __init__(self, parts: Sequence[Any], shares: Sequence[float], length: int, batch: int, seed: int):
        self.parts = parts
        self.length = length
        self.batch = batch
        self.seed = seed
        rng = random.Random(f"{seed}/mixture")
        self._chosen = rng.choices(range(len(parts)), shares, k=-(-length // batch))
        # For each batch, the number of earlier batches from the same source.
        counts = [0] * len(parts)
        self._before = []
        self._shuffled: dict[int, tuple[int, list[int]]] = {}
        for part in self._chosen:
            self._before.append(counts[part])
            counts[part] += 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        batch, within = divmod(index, self.batch)
        part = self.parts[self._chosen[batch]]
        if isinstance(part, StreamSamples):
            return part[index]
        turn, place = divmod(self._before[batch] * self.batch + within, len(part))
        sample: Sample = part[self._order(self._chosen[batch], turn)[place]]
        return sample

    def _order(self, part: int, turn: int) -> list[int]:
        """The order in which a source is read in epoch ``turn``."""
        if self._shuffled.get(part, (None, []))[0] != turn:
            rows = list(range(len(self.parts[part])))
            random.Random(f"{self.seed}/{part}/{turn}").shuffle(rows)
            self._shuffled[part] = (turn, rows)
        return self._shuffled[part][1]


class Collator:
    """Turn samples into a model batch: write the memories, pack the questions and pad.

    The abstract memory is left to the model, which needs gradients through it. With a ``hinter``,
    prompts have cues, notes and recalled frames, as at inference. Sequences are cut
    to ``max_length`` tokens. With ``chains``, batches suit flash kernels, which know no masks: ``UserError``
    unless each sample is one dialogue.

    Beside the model's inputs, a batch has ``problems``, those of its samples, and ``truncated``, how many
    sequences were cut.
    """

    def __init__(
        self,
        processor: FlashVStreamProcessor,
        star: StarConfig,
        hinter: Hinter | None = None,
        max_length: int | None = None,
        chains: bool = False,
    ):
        self.processor = processor
        self.star = star
        self.hinter = hinter
        self.max_length = max_length
        self.chains = chains

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        packed, tokens, frames = [], [], []
        for sample in samples:
            sequence, own_tokens, own_frames = self._one(sample)
            packed.append(sequence)
            tokens.append(own_tokens)
            frames.append(own_frames)
        if self.chains and not all(sequence.is_chain for sequence in packed):
            raise UserError(
                "flash_attention_2 trains dialogues only, and this data has several questions or answers that do not"
                " see each other; use attention: sdpa"
            )
        batch = collate(packed, self.processor.tokenizer.pad_token_id or 0, chains=self.chains)
        counts = {
            "problems": [sample.problem for sample in samples if sample.problem],
            "truncated": sum(sequence.truncated for sequence in packed),
        }
        return {**batch, "memory_features": tokens, "abstract_frames": frames, **counts}

    def _one(self, sample: Sample) -> tuple[Packed, Tensor, Tensor]:
        """A sample's sequence, its memory's tokens and the frames of its abstract memory."""
        if sample.problem:
            unread = Packed()
            unread.add([self.processor.tokenizer.pad_token_id or 0], -1)
            return unread, torch.zeros(0), torch.zeros(0)
        if sample.features is None:
            sequence = pack(self.processor, None, sample.turns, sample.independent, self.max_length)
            return sequence, torch.zeros(0), torch.zeros(0)
        memory = StarMemory(replace(self.star, abstract_length=0), sample.features.shape[-1])
        memory.write(sample.features, sample.times)
        snapshot = memory.read()
        pooled = pool_grid(pool_grid(sample.features, self.star.spatial_size), self.star.abstract_size)
        kept = min(len(pooled), self.star.abstract_length)
        shown = replace(snapshot, abstract=Slots.of_frames(pooled[:kept], sample.times[:kept]))
        if self.hinter is None:
            sequence = pack(self.processor, shown, sample.turns, sample.independent, self.max_length)
            return sequence, snapshot.tokens(), pooled
        turns, lines = self._hinted(sample.turns, snapshot, self.hinter)
        sequence = pack(
            self.processor,
            shown,
            turns,
            sample.independent,
            self.max_length,
            self.hinter.cue(snapshot),
            [line.ids for line in lines],
        )
        packed = lines[: sequence.turns]
        seen = [line.features.to(snapshot.spatial.features) for line in packed if line.features is not None]
        return sequence, torch.cat([snapshot.tokens(), *seen]), pooled

    def _hinted(
        self, turns: Sequence[Turn], snapshot: MemorySnapshot, hinter: Hinter
    ) -> tuple[list[Turn], list[Layout]]:
        """The turns with their notes, and the lines of the frames that each recalls."""
        noted, lines = [], []
        found = hinter.hints([turn.question for turn in turns], snapshot)
        for turn, own in zip(turns, found, strict=True):
            own = replace(own, mentions=_less_sure(own.mentions))
            noted.append(replace(turn, question=own.annotate(turn.question)))
            lines.append(own.lay_out_recalled(self.processor, 0))
        return noted, lines


def _less_sure(mentions: list[Mention]) -> list[Mention]:
    """Randomly mark events as unseen in questions that name two.

    On new pictures grounding sometimes misses an event that was seen, but hardly ever on the pictures
    it was trained on. The model should still learn to say which event came first.
    """
    if len(mentions) < 2:
        return mentions
    rng = random.Random("".join(mention.text for mention in mentions))
    return [replace(mention, score=-1.0) if rng.random() < UNSURE else mention for mention in mentions]
