"""Training of a vision tower together with the small networks that read its features.

nano's tower was only ever taught to tell ImageNet's classes. Here the last of its blocks learn what the small networks
need: which things a picture shows and how many people (sight), what questions about it have short answers, and
which sentence or phrase describes which picture of a batch (grounding, contrastively). The networks learn alongside.
Batch norm keeps its statistics, and what is saved is a moving average of the weights.

What the blocks before them make of several views of each picture is computed once and kept on disk, so that two cores
train in half an hour. The features that the stages train on are then cheap to compute as well.
"""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoProcessor

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write
from flash_vstream.memory import pool_grid
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.engines.openvino_tower import OpenVinoTower
from flash_vstream.models.grounding import Grounding, Words
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.short_answers import ShortAnswers
from flash_vstream.models.sight import Sight
from flash_vstream.models.small_networks import save_networks, save_tower
from flash_vstream.synthetic.views import VIEWS
from flash_vstream.train import grounding as grounding_training
from flash_vstream.train import short_answers as short_answers_training
from flash_vstream.train.annotated import AnnotatedPictures, grid_sides
from flash_vstream.train.config import load_settings
from flash_vstream.train.fitting import SAVE_EVERY, run_steps
from flash_vstream.train.gallery import TOGETHER, Encode, Gallery
from flash_vstream.train.grounding import comparison_loss, marking_loss
from flash_vstream.train.short_answers import asked_of, frequent_answers, short_answers_loss
from flash_vstream.train.sight import calibrate, sight_loss, untrained_sight

QUESTIONS = 3
"""Questions with short answers about each picture of a batch."""
MARKED = 32
"""Questions per step that grounding learns to mark."""


@dataclass(frozen=True)
class TowerConfig:
    """A run of training; see ``configs/nano-tower.yaml``.

    ``frozen`` is how many of the tower's first blocks stay as they are, and ``crops`` how many random crops of each
    picture they see beside its views. ``tower_rate`` is the learning rate of its last
    block; each block before it has ``decay`` times the rate of the next. ``answers_width``, ``hidden`` and the two
    ``least`` settings are those of short answers and sight.
    """

    model: str
    steps: int
    batch_size: int
    learning_rate: float
    tower_rate: float
    decay: float = 0.85
    frozen: int = 16
    crops: int = 3
    weight_decay: float = 0.05
    average: float = 0.995
    hidden: int = 512
    least_things: int = 12
    answers_width: int = 256
    least_answers: int = 4
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> "TowerConfig":
        """Read a YAML file; raises ``UserError`` naming what is wrong with it."""
        return load_settings(cls, path)


class Questions:
    """What short answers are trained on: all questions about pictures, grouped by picture."""

    def __init__(self, shown: AnnotatedPictures, answers: Sequence[str], seed: int):
        asked = asked_of(shown, answers, seed, repeats=3)
        self.texts = asked.texts
        self.of: list[list[tuple[int, int]]] = [[] for _ in shown.keys]
        for row, text, answer in asked.pairs.tolist():
            self.of[row].append((text, answer))

    def draw(self, rows: Sequence[int], rng: random.Random) -> tuple[list[int], list[str], list[int]]:
        """``QUESTIONS`` about each of ``rows``: places among the rows, texts, and numbers of answers."""
        drawn = [
            (place, *pair)
            for place, row in enumerate(rows)
            for pair in rng.sample(self.of[row], min(QUESTIONS, len(self.of[row])))
        ]
        return (
            [place for place, _, _ in drawn],
            [self.texts[t] for _, t, _ in drawn],
            [answer for _, _, answer in drawn],
        )


class Learner(nn.Module):
    """A vision tower and the networks that learn with it."""

    def __init__(
        self, tower: nn.Module, grounding: Grounding, sight: Sight, short_answers: ShortAnswers, side: int, frozen: int
    ):
        super().__init__()
        self.tower, self.grounding, self.sight, self.short_answers = tower, grounding, sight, short_answers
        self.side, self.frozen = side, frozen

    def maps(self, middle: Tensor) -> Tensor:
        """Pooled feature maps ``[n, P², D]`` float32 of what the first blocks made, ``[n, C, h, w]``."""
        tower: Any = self.tower
        middle = middle.to(tower.device, torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.autocast(middle.device.type, torch.bfloat16, enabled=middle.is_cuda):
            features = tower.last_blocks(middle, self.frozen)
        return pool_grid(features.float(), self.side)


Measure = Callable[[Learner, int], object]


class Lesson:
    """What one step of training sees, and its loss."""

    def __init__(self, shown: Gallery, learner: Learner, words: Words, config: TowerConfig, labels: Tensor):
        self.shown, self.words, self.config = shown, words, config
        self.device = next(learner.parameters()).device
        self.labels, self.people = labels.to(self.device), shown.people().to(self.device)
        self.described = shown.described(words)
        self.vocabularies = [copy.deepcopy(self.described.vocabulary).to(self.device) for _ in learner.grounding.each()]
        self.questions = Questions(shown, learner.short_answers.answers, config.seed)

    def loss(self, learner: Learner, rng: random.Random) -> Tensor:
        """The sum of all networks' losses on a batch of pictures."""
        rows = self.described.batch(self.config.batch_size, rng)
        views = torch.randint(0, self.shown.middle.shape[1], (len(rows),))
        maps = learner.maps(self.shown.middle[rows, views])
        sides = grid_sides(maps.shape[1])
        total = sight_loss(learner.sight, pool_grid(maps, rng.choice(sides)), self.labels[rows], self.people[rows])
        for member, vocabulary in zip(learner.grounding.each(), self.vocabularies, strict=True):
            total = total + comparison_loss(member, vocabulary, self.words, self.described, rows, maps, rng)
            total = total + marking_loss(member, self.words, self.described, MARKED, rng)
        places, texts, answers = self.questions.draw(rows, rng)
        embeddings, mask = self.words.embed(texts)
        frames = pool_grid(maps, rng.choice(sides))[places]
        targets = torch.tensor(answers, device=self.device)
        return total + short_answers_loss(learner.short_answers, embeddings, mask, frames, targets)


def train_tower(config: TowerConfig, model_folder: Path, data: Path, output: Path) -> dict[str, Any]:
    """Train on the annotated pictures in ``data``; write what was trained, a check and ``model``, a model folder.

    ``prepared`` beside them is what ``train prepare`` would make of the annotated pictures with that model. Goes on
    from ``tower-checkpoint.pt`` in ``output`` when an earlier run was stopped.
    """
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor: Any = AutoProcessor.from_pretrained(model_folder)
    model = FlashVStreamForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    if model.grounding is None:
        raise UserError(f"{model_folder} has no grounding to train; its config lacks grounding_config")
    output.mkdir(parents=True, exist_ok=True)
    frames = processor.image_processor
    encode = _first_blocks(model.vision_tower, frames, config.frozen)
    shown, unseen = (Gallery(data, split, frames, config.crops, encode, output) for split in ("train", "val"))
    channels, width = model.feature_shape[1], model.config.text_config.hidden_size
    sight, labels = untrained_sight(shown, channels, config.hidden, config.least_things)
    answers = frequent_answers(shown, config.least_answers, config.seed)
    model.sight, model.short_answers = sight, ShortAnswers(channels, width, answers, config.answers_width)
    model.config.sight_config, model.config.short_answers_config = sight.config(), model.short_answers.config()
    table: Any = model.get_input_embeddings().weight
    words = Words(processor.tokenizer, table.detach().to(device))
    side = model.config.pooled_size
    learner = Learner(model.vision_tower, model.grounding, sight, model.short_answers, side, config.frozen).to(device)

    lesson = Lesson(shown, learner, words, config, labels)

    def measure(averaged: Learner, step: int) -> dict[str, Any]:
        choose_common(averaged, lesson)
        result = check(averaged, unseen, words, config.seed)
        with (output / "tower-log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, **result}) + "\n")
        return result

    averaged = _fit(learner, lesson, config, output, measure)
    result = measure(averaged, config.steps)
    learner.load_state_dict(averaged.state_dict())
    words_known = {"vocabulary": averaged.grounding.vocabulary}  # not in a state
    model.config.grounding_config = model.config.grounding_config | words_known
    model.cpu()
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    save_networks(model, output)
    trained = [name for name, weight in model.vision_tower.named_parameters() if weight.requires_grad]
    save_tower(model, output, trained)
    learner.to(device)
    _prepare(learner, {"train": shown, "val": unseen}, data, output / "prepared")
    (output / "tower-check.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


@torch.inference_mode()
def _prepare(learner: Learner, galleries: Mapping[str, Gallery], data: Path, output: Path) -> None:
    """Write the features of all galleries' views, float16 ``[VIEWS, P², D]`` by key, as the stages read them."""
    learner.eval()
    output.mkdir(exist_ok=True)
    for name in ("captions.json", "annotations.jsonl"):
        shutil.copyfile(data / name, output / name)
    for split, gallery in galleries.items():
        features: dict[str, Tensor] = {}
        rows = gallery.middle[:, :VIEWS].split(TOGETHER)
        for part in track(rows, f"preparing {split}", console=Console(stderr=True)):
            maps = learner.maps(part.flatten(0, 1)).half().cpu()
            keys = gallery.keys[len(features) : len(features) + len(part)]
            features.update(zip(keys, (own.clone() for own in maps.split(VIEWS)), strict=True))
        with atomic_write(output / f"{split}.safetensors") as scratch:
            save_file(features, scratch)


def _first_blocks(tower: Any, frames: FrameProcessor, count: int) -> Encode:
    """What the tower's first ``count`` blocks make of frames, as fast as can be here."""
    first: Callable[[Tensor], Tensor] = lambda pixels: tower.first_blocks(pixels, count)  # noqa: E731
    if torch.cuda.is_available():
        tower.cuda()
    else:
        with contextlib.suppress(ImportError, RuntimeError):
            first = OpenVinoTower(tower, blocks=count).first_blocks

    @torch.inference_mode()
    def encode(squares: Tensor) -> Tensor:
        return first(frames.pixels(squares.to(tower.device)))

    return encode


def _fit(learner: Learner, lesson: Lesson, config: TowerConfig, output: Path, measure: Measure) -> Learner:
    """Train for the config's steps and return the moving average, resuming from the checkpoint in ``output``.

    The average is measured with every checkpoint.
    """
    groups = list(_groups(learner, lesson, config))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=lesson.device.type == "cuda")
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=config.steps, pct_start=0.1)
    averaged: Any = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    parts: dict[str, Any] = {
        "learner": learner,
        "vocabularies": nn.ModuleList(lesson.vocabularies),
        "optimizer": optimizer,
        "schedule": schedule,
        "averaged": averaged,
    }

    def loss(rng: random.Random) -> Tensor:
        torch.manual_seed(rng.getrandbits(63))
        for network in (learner.grounding, learner.sight, learner.short_answers):
            network.train()
        learner.tower.eval()  # batch norm keeps its statistics
        return lesson.loss(learner, rng)

    def after_step(step: int) -> None:
        averaged.update_parameters(learner)
        if step % SAVE_EVERY == 0 and step < config.steps:
            measure(averaged.module, step)

    run_steps("tower", config, output / "tower-checkpoint.pt", parts, loss, 5.0, after_step)
    module: Learner = averaged.module
    return module


def _groups(learner: Learner, lesson: Lesson, config: TowerConfig) -> Iterator[dict[str, Any]]:
    """The optimizer's groups: the tower's blocks at falling rates, and the networks; the rest is frozen."""
    tower: Any = learner.tower
    learner.tower.requires_grad_(False)
    blocks = [*tower.blocks, tower.head]
    for number, block in enumerate(blocks[config.frozen :], config.frozen):
        block.requires_grad_(True)
        rate = config.tower_rate * config.decay ** (len(blocks) - 1 - number)
        yield {"params": list(block.parameters()), "lr": rate, "weight_decay": config.weight_decay}
    networks = [learner.grounding, learner.sight, learner.short_answers]
    parameters = [parameter for network in networks for parameter in network.requires_grad_(True).parameters()]
    yield {"params": parameters, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    yield {
        "params": list(nn.ModuleList(lesson.vocabularies).parameters()),
        "lr": config.learning_rate,
        "weight_decay": 0.0,
    }


@torch.inference_mode()
def choose_common(learner: Learner, lesson: Lesson) -> None:
    """Give grounding its common pictures and its vocabulary: those of the lesson."""
    learner.eval()
    middle = lesson.shown.middle[:, 0]
    every = max(1, len(middle) // max(1, learner.grounding.common.shape[1]))
    maps = _all_maps(learner, middle[::every])
    learner.grounding.choose_common(maps, lesson.words, lesson.described.vocabulary.words)


@torch.inference_mode()
def check(learner: Learner, unseen: Gallery, words: Words, seed: int) -> dict[str, Any]:
    """Set the networks' thresholds on pictures that were not trained on, and measure all of them there."""
    learner.eval()
    maps = _all_maps(learner, unseen.middle[:, 0])
    grounding = grounding_training.check(learner.grounding, words, unseen.described(words), maps, seed)
    learner.grounding.threshold.fill_(grounding.threshold)
    learner.grounding.slope.fill_(grounding.slope)
    return {
        "sight": asdict(calibrate(learner.sight, unseen, maps, seed)),
        "grounding": asdict(grounding),
        "short_answers": short_answers_training.check(learner.short_answers, unseen, maps, words, seed),
    }


def _all_maps(learner: Learner, middle: Tensor) -> Tensor:
    return torch.cat([learner.maps(part) for part in middle.split(64)])
