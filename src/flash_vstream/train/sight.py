"""Training of sight: which things a frame shows, and how many people.

Features are cached, so it takes a few minutes on a CPU. A picture has a thing when any of its texts names it;
annotations are not exhaustive, so some things that count as absent are there. Thresholds are set on pictures that were
not trained on.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write
from flash_vstream.memory import pool_grid
from flash_vstream.models.sight import PEOPLE_CLASSES, SIGHT_CONFIG, Sight, save_sight
from flash_vstream.synthetic.annotations import (
    PERSON,
    Annotation,
    frequent_things,
    head_noun,
    read_annotations,
    things_in,
    wordings,
)
from flash_vstream.train.config import read_settings

SAVE_EVERY = 250


@dataclass(frozen=True)
class SightConfig:
    """A run of sight's training; see ``configs/nano-sight.yaml``. ``least`` is in how many pictures a thing must be."""

    steps: int
    batch_size: int
    learning_rate: float
    hidden: int = 512
    least: int = 12
    weight_decay: float = 0.05
    train_split: str = "train"
    val_split: str = "val"
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> "SightConfig":
        """Read a YAML file; raises ``UserError`` naming what is wrong with it."""
        try:
            return cls(**read_settings(path))
        except TypeError as error:
            known = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{path}: {error}; the settings are {known}") from None


class AnnotatedFeatures:
    """Features of annotated pictures in memory, ``[N, views, P², D]`` float16, from prepared folders."""

    def __init__(self, folders: Sequence[Path], split: str):
        self.annotations: dict[str, Annotation] = {}
        self.captions: dict[str, list[str]] = {}
        self.keys: list[str] = []
        parts: list[Tensor] = []
        for folder in folders:
            path = folder / f"{split}.safetensors"
            if not path.exists():
                continue
            annotations = read_annotations(folder / "annotations.jsonl")
            with safe_open(path, "pt") as file:
                keys = sorted(set(file.keys()) & set(annotations))
                parts += [file.get_tensor(key) for key in keys]
            self.keys += keys
            self.annotations |= {key: annotations[key] for key in keys}
            captions = json.loads((folder / "captions.json").read_text())
            self.captions |= {key: captions.get(key, []) for key in keys}
        if not parts:
            raise UserError(
                f"no annotated pictures of the split {split!r} in {', '.join(map(str, folders))};"
                " run: flash-vstream train prepare PICTURES FOLDER"
            )
        self.features = torch.stack(parts)

    def labels(self, things: Sequence[str]) -> Tensor:
        """Which things each picture has ``[N, V]``, 0 or 1."""
        index = {name: number for number, name in enumerate(things)}
        labels = torch.zeros(len(self.keys), len(things))
        for row, key in enumerate(self.keys):
            annotation = self.annotations[key]
            named = things_in([*annotation.texts, *self.captions[key]], set(things))
            named |= {PERSON} & set(things) if annotation.people else set()
            labels[row, [index[name] for name in named]] = 1
        return labels

    def people(self) -> Tensor:
        """The class of the number of people in each picture ``[N]``."""
        counts = [self.annotations[key].people for key in self.keys]
        return torch.tensor(counts).clamp(max=PEOPLE_CLASSES - 1)


@dataclass(frozen=True)
class Check:
    """How well pictures that were not trained on are read.

    ``presence`` is the balanced accuracy of whether a thing is there, over listed things and things that no text
    names; ``person`` is that of anybody; ``people`` is the share of right counts (0, 1, 2, more); ``streams`` is
    presence among 16 pictures.
    """

    presence: float
    person: float
    people: float
    streams: float


def train_sight(config: SightConfig, folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Train on prepared folders; writes ``sight.safetensors``, ``sight.json`` and ``sight-check.json`` to ``output``.

    Goes on from ``sight-checkpoint.pt`` there when an earlier run was stopped.
    """
    torch.manual_seed(config.seed)
    shown, unseen = (AnnotatedFeatures(folders, split) for split in (config.train_split, config.val_split))
    things = frequent_things([shown.annotations[key] for key in shown.keys], config.least)
    if PERSON not in things:
        things = [PERSON, *things]
    aliases = wordings(things)
    sight = Sight(shown.features.shape[-1], things, aliases, config.hidden)
    labels = shown.labels(things)
    sight.prior.copy_(torch.logit(labels.mean(0).clamp(1e-4, 1 - 1e-4)))
    with torch.no_grad():
        sight.things.bias.copy_(sight.prior)
    output.mkdir(parents=True, exist_ok=True)
    _fit(sight, shown.features, labels, shown.people(), config, output / "sight-checkpoint.pt")
    result = calibrate(sight, unseen)
    save_sight(sight, output)
    (output / SIGHT_CONFIG).write_text(json.dumps({"things": things, "aliases": aliases, "hidden": config.hidden}))
    (output / "sight-check.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return asdict(result)


def _fit(sight: Sight, features: Tensor, labels: Tensor, people: Tensor, config: SightConfig, kept: Path) -> None:
    optimizer = torch.optim.AdamW(sight.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    parts: dict[str, Any] = {"sight": sight, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        begin = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    sides = _sides(features.shape[-2])
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sight", total=config.steps, completed=begin)
        sight.train()
        for step in range(begin, config.steps):
            # Drawn by seed and step alone, so that a resumed run draws what an undisturbed one would.
            rng = random.Random(f"{config.seed}/{step}")
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            torch.manual_seed(rng.getrandbits(63))
            rows = torch.randint(0, len(features), (config.batch_size,), generator=generator)
            views = torch.randint(0, features.shape[1], (config.batch_size,), generator=generator)
            seen = sight(pool_grid(features[rows, views].float(), rng.choice(sides)))
            loss = functional.binary_cross_entropy_with_logits(
                seen.things + sight.prior, labels[rows], reduction="sum"
            ) / len(rows) + functional.cross_entropy(seen.people, people[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"sight, loss {loss.item():.2f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
                with atomic_write(kept) as scratch:
                    torch.save({"step": step + 1} | {n: p.state_dict() for n, p in parts.items()}, scratch)


def _sides(tokens: int) -> list[int]:
    """The grid sides to train on: as stored twice as often as halved, which is how temporal slots hold a frame."""
    side = round(tokens**0.5)
    return [side, side, side // 2] if side % 2 == 0 and side > 1 else [side]


@torch.inference_mode()
def calibrate(sight: Sight, unseen: AnnotatedFeatures, seed: int = 0) -> Check:
    """Measure on unseen pictures, and set the thresholds for one frame and for several."""
    sight.eval()
    rng = random.Random(f"sight/{seed}")
    seen = sight(pool_grid(unseen.features[:, 0].float(), _sides(unseen.features.shape[-2])[0]))
    labels = unseen.labels(sight.names)
    pairs = list(_pairs(sight, unseen, labels, rng))
    single = [(float(seen.things[row, name]), there) for row, name, there in pairs]
    base, presence = _threshold(single)
    several = []
    for row, name, there in pairs:  # among 16 pictures, of which the others are not named after the thing
        others = rng.sample(range(len(unseen.keys)), min(15, len(unseen.keys) - 1))
        rows = [row, *(other for other in others if not labels[other, name])]
        several.append((float(seen.things[rows, name].max()), there))
    high, streams = _threshold(several)
    slope = max(0.0, (high - base) / torch.log(torch.tensor(16.0)).item())
    sight.threshold.copy_(torch.tensor([base, slope]))
    somebody = [unseen.annotations[key].people > 0 for key in unseen.keys]
    logits = seen.things[:, sight.names.index(PERSON)].tolist()
    said = [logit > base for logit in logits]
    person = _balanced(said, somebody)
    counts = (seen.people.argmax(1).clamp(max=3) == unseen.people().clamp(max=3)).float().mean()
    return Check(round(presence, 4), round(person, 4), round(float(counts), 4), round(streams, 4))


def _pairs(
    sight: Sight, unseen: AnnotatedFeatures, labels: Tensor, rng: random.Random
) -> Iterator[tuple[int, int, bool]]:
    """Pictures with two things that are listed and two that no text names, drawn as often as they are listed."""
    index = {name: number for number, name in enumerate(sight.names)}
    listed = [
        sorted({index[noun] for phrase in unseen.annotations[key].objects if (noun := head_noun(phrase)) in index})
        for key in unseen.keys
    ]
    drawn = [number for numbers in listed for number in numbers]
    for row, numbers in enumerate(listed):
        for number in rng.sample(numbers, min(2, len(numbers))):
            yield row, number, True
            absent = [other for other in rng.sample(drawn, min(50, len(drawn))) if not labels[row, other]]
            if absent:
                yield row, absent[0], False


def _balanced(said: Sequence[bool], true: Sequence[bool]) -> float:
    right = {there: [s == t for s, t in zip(said, true, strict=True) if t == there] for there in (True, False)}
    return sum(sum(part) / max(1, len(part)) for part in right.values()) / 2


def _threshold(scored: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    """The threshold with the best balanced accuracy, and that accuracy."""
    true = [there for _, there in scored]
    best: Mapping[float, float] = {
        at / 20: _balanced([score > at / 20 for score, _ in scored], true) for at in range(-60, 121)
    }
    at = max(best, key=best.__getitem__)
    return at, best[at]
