"""Training samples: feature streams with questions, from composed pictures or LLaVA-format data."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, Slots, StarConfig, StarMemory, pool_grid
from flash_vstream.models.grounding import Grounder, Mention, annotate
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.synthetic.captions import PictureSet, play
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle, plan_stream
from flash_vstream.synthetic.questions import Turn
from flash_vstream.train.packing import collate, pack

UNSURE = 0.25
"""In questions about two events, the probability that a note marks an event as unseen."""


@dataclass(frozen=True)
class Sample:
    """A stream and the questions about it: ``features [T, P², D]``, ``times [T]`` and turns.

    ``features`` is None for plain chat. With ``independent``, each turn sees only the stream;
    otherwise the turns form one dialogue.
    """

    features: Tensor | None
    times: Tensor
    turns: tuple[Turn, ...]
    independent: bool = True


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
        plan = plan_stream(self.keys, style, rng)
        features, times = play(plan, self.pictures)
        return Sample(features, times, tuple(self.ask(plan, rng)))


class LlavaSamples(Dataset[Sample]):
    """LLaVA-format JSON: a list of ``{"conversations": [{"from", "value"}, …], …}``.

    A sample's stream comes from ``"features": "file.safetensors:key"`` (``[T, P², D]``, with times
    from ``file.safetensors:key.times`` if present, otherwise one frame per second), from ``"image"``
    or from ``"video"``. Images and videos go through ``encode``, which maps a path to features and
    times. An entry with none of these is plain chat. Paths are relative to ``folder``.
    """

    def __init__(
        self, path: Path, folder: Path, encode: Callable[[Path], tuple[Tensor, Tensor]], independent: bool = False
    ):
        self.entries = checked_entries(path, folder)
        self.folder = folder
        self.encode = encode
        self.independent = independent

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        features, times = self._stream(entry)
        turns = turns_of(entry, str(entry.get("id", index)))
        return Sample(features, times, turns, self.independent)

    def _stream(self, entry: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        if "features" in entry:
            name, _, key = entry["features"].partition(":")
            with safe_open(self.folder / name, "pt") as file:
                features = file.get_tensor(key)
                has_times = f"{key}.times" in file.keys()  # noqa: SIM118 - not a dict
                times = file.get_tensor(f"{key}.times") if has_times else torch.arange(len(features)).double()
            return features.float(), times.double()
        for kind in ("image", "video"):
            if kind in entry:
                return self.encode(self.folder / entry[kind])
        return None, torch.zeros(0, dtype=torch.float64)


SHOWN_PROBLEMS = 10


def checked_entries(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Load and validate the entries of a LLaVA-format file.

    Raises a single ``UserError`` that counts and lists all problems: malformed entries, turns without
    a question and an answer, missing or empty media. Media are not decoded here.
    """
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no training data at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file of training data ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a list of entries with conversations, not empty")
    problems = [problem for i, entry in enumerate(entries) if (problem := _problem(entry, i, folder))]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(f"{len(problems)} of {len(entries)} entries of {path} cannot be trained on:\n{shown}{more}")
    return entries


def _problem(entry: Any, index: int, folder: Path) -> str | None:
    """The reason why an entry cannot be used for training, or None."""
    if not isinstance(entry, dict):
        return f"entry {index} is no object"
    name = f"entry {entry.get('id', index)}"
    parts = entry.get("conversations")
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("from"), str) and isinstance(part.get("value"), str)
        for part in parts
    ):
        return f"{name} needs conversations: a list of objects with from and value"
    try:
        turns_of(entry, str(entry.get("id", index)))
    except UserError as error:
        return str(error)
    for kind in ("features", "image", "video"):
        medium = entry.get(kind)
        if kind in entry and not isinstance(medium, str):
            return f"{name}: {kind} must be one path"
        if isinstance(medium, str):
            file = folder / (medium.partition(":")[0] if kind == "features" else medium)
            if not file.exists():
                return f"{name}: no file {file}"
            if file.is_file() and file.stat().st_size == 0:
                return f"{name}: {file} is empty"
    return None


USER_ROLES = frozenset({"human", "user"})
ANSWER_ROLES = frozenset({"gpt", "assistant", "model"})


def turns_of(entry: dict[str, Any], name: str) -> tuple[Turn, ...]:
    """The turns of a LLaVA conversation; consecutive parts with the same role are joined.

    Assistant text before the first question, ``system`` parts and a final unanswered question are
    left out. Raises ``UserError`` naming the sample when a role is unknown or no question has an
    answer.
    """
    turns: list[tuple[str, str]] = []
    last = None
    for part in entry["conversations"]:
        role, text = part["from"], part["value"].replace("<image>", "").replace("<video>", "").strip()
        if role in USER_ROLES:
            turns = [*turns[:-1], (f"{turns[-1][0]}\n{text}", "")] if last == "question" else [*turns, (text, "")]
            last = "question"
        elif role in ANSWER_ROLES:
            if turns:
                question, answer = turns[-1]
                turns[-1] = (question, f"{answer}\n{text}".strip())
                last = "answer"
        elif role != "system":
            raise UserError(f"sample {name} has a turn of {role!r}; roles are human and gpt, or user and assistant")
    answered = tuple(Turn(question, (answer,)) for question, answer in turns if answer)
    if not answered:
        raise UserError(f"sample {name} has no question with an answer")
    return answered


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

    The abstract memory is left to the model, which needs gradients through it. With a ``grounder``,
    each event in a question is annotated with what the grounder finds, as at inference.
    """

    def __init__(self, processor: FlashVStreamProcessor, star: StarConfig, grounder: Grounder | None = None):
        self.processor = processor
        self.star = star
        self.grounder = grounder

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        packed, tokens, frames = [], [], []
        for sample in samples:
            if sample.features is None:
                packed.append(pack(self.processor, None, sample.turns, sample.independent))
                tokens.append(torch.zeros(0))
                frames.append(torch.zeros(0))
                continue
            memory = StarMemory(replace(self.star, abstract_length=0), sample.features.shape[-1])
            memory.write(sample.features, sample.times)
            snapshot = memory.read()
            pooled = pool_grid(pool_grid(sample.features, self.star.spatial_size), self.star.abstract_size)
            kept = min(len(pooled), self.star.abstract_length)
            shown = replace(snapshot, abstract=Slots.of_frames(pooled[:kept], sample.times[:kept]))
            packed.append(pack(self.processor, shown, self._noted(sample.turns, snapshot), sample.independent))
            tokens.append(snapshot.tokens())
            frames.append(pooled)
        batch = collate(packed, self.processor.tokenizer.pad_token_id or 0)
        return {**batch, "memory_features": tokens, "abstract_frames": frames}

    def _noted(self, turns: Sequence[Turn], snapshot: MemorySnapshot) -> Sequence[Turn]:
        if self.grounder is None:
            return turns
        found = self.grounder.mentions([turn.question for turn in turns], snapshot)
        return [
            replace(turn, question=annotate(turn.question, _less_sure(own)))
            for turn, own in zip(turns, found, strict=True)
        ]


def _less_sure(mentions: list[Mention]) -> list[Mention]:
    """Randomly mark events as unseen in questions that name two.

    On new pictures grounding sometimes misses an event that was seen, but hardly ever on the pictures
    it was trained on. The model should still learn to say which event came first.
    """
    if len(mentions) < 2:
        return mentions
    rng = random.Random("".join(mention.text for mention in mentions))
    return [replace(mention, score=-1.0) if rng.random() < UNSURE else mention for mention in mentions]
