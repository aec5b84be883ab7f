"""Training of sight: which things a frame shows, and how many people.

Features are cached, so it takes a few minutes on a CPU. A picture has a thing when any of its texts names it;
annotations are not exhaustive, so some things that count as absent are there. Thresholds are set on pictures that were
not trained on.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flash_vstream.memory import pool_grid
from flash_vstream.models.sight import PERSON, Seen, Sight, number_of_people
from flash_vstream.models.small_networks import save_network
from flash_vstream.synthetic.annotations import frequent_things, head_noun, wordings
from flash_vstream.train.annotated import AnnotatedFeatures, AnnotatedPictures, grid_sides
from flash_vstream.train.config import load_settings
from flash_vstream.train.fitting import fit


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
        return load_settings(cls, path)


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
    sight, labels = untrained_sight(shown, shown.maps.shape[-1], config.hidden, config.least)
    output.mkdir(parents=True, exist_ok=True)
    people, sides = shown.people(), grid_sides(shown.maps.shape[-2])

    def loss(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = torch.randint(0, len(shown.keys), (config.batch_size,), generator=generator)
        return sight_loss(sight, pool_grid(shown.draw(rows, generator), rng.choice(sides)), labels[rows], people[rows])

    fit(sight, "sight", config, output / "sight-checkpoint.pt", loss)
    result = calibrate(sight, unseen, unseen.whole(torch.arange(len(unseen.keys))))
    save_network(sight, "sight", output, sight.config())
    (output / "sight-check.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return asdict(result)


def untrained_sight(shown: AnnotatedPictures, channels: int, hidden: int, least: int) -> tuple[Sight, Tensor]:
    """A network for the things that at least ``least`` pictures have, and which pictures have them ``[N, V]``."""
    things = frequent_things([shown.annotations[key] for key in shown.keys], least)
    if PERSON not in things:
        things = [PERSON, *things]
    sight = Sight(channels, things, wordings(things), hidden)
    labels = shown.labels(things)
    sight.prior.copy_(torch.logit(labels.mean(0).clamp(1e-4, 1 - 1e-4)))
    with torch.no_grad():
        sight.things.bias.copy_(sight.prior)
    return sight, labels


def sight_loss(sight: Sight, maps: Tensor, labels: Tensor, people: Tensor) -> Tensor:
    """Cross entropy of things, summed over ``labels [n, V]``, and of the numbers of ``people [n]``."""
    seen = sight(maps)
    missed = functional.binary_cross_entropy_with_logits(seen.things + sight.prior, labels, reduction="sum")
    return missed / len(maps) + functional.cross_entropy(seen.people, people)


@torch.inference_mode()
def calibrate(sight: Sight, unseen: AnnotatedPictures, maps: Tensor, seed: int = 0) -> Check:
    """Measure on unseen pictures with features ``maps [N, P², D]``; set the thresholds for one frame and several."""
    sight.eval()
    rng = random.Random(f"sight/{seed}")
    found = sight(maps)
    seen = Seen(found.things.cpu(), found.people.cpu())
    labels = unseen.labels(sight.names)
    pairs = list(_pairs(sight, unseen, labels, rng))
    single = [(float(seen.things[row, name]), there) for row, name, there in pairs]
    base, presence = _threshold(single)
    several = []
    for row, name, there in pairs:
        # among up to 16 pictures: this one, and others whose texts do not name the thing
        others = rng.sample(range(len(unseen.keys)), min(15, len(unseen.keys) - 1))
        rows = [row, *(other for other in others if not labels[other, name])]
        several.append((float(seen.things[rows, name].max()), there))
    high, streams = _threshold(several)
    slope = max(0.0, (high - base) / torch.log(torch.tensor(16.0)).item())
    sight.threshold.copy_(torch.tensor([base, slope]))
    somebody = [unseen.annotations[key].people > 0 for key in unseen.keys]
    logits = sight.shown(maps)[:, sight.names.index(PERSON)].tolist()
    person = _balanced([logit > sight.needed(1) for logit in logits], somebody)
    counts = (number_of_people(seen.people).clamp(max=3) == unseen.people().clamp(max=3)).float().mean()
    return Check(round(presence, 4), round(person, 4), round(float(counts), 4), round(streams, 4))


def _pairs(
    sight: Sight, unseen: AnnotatedPictures, labels: Tensor, rng: random.Random
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
