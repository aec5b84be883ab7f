"""Training of short answers: a classifier over frequent answers to questions about annotated pictures.

Features are cached, so it takes minutes on a CPU. The questions are those of the annotations, and those that follow
from them (``synthetic/short_questions.py``, ``synthetic/closed_questions.py``).
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor

from flash_vstream.memory import pool_grid
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.grounding import Words
from flash_vstream.models.prompts import stamp
from flash_vstream.models.short_answers import NO, NONE, YES, ShortAnswers
from flash_vstream.models.small_networks import save_network
from flash_vstream.synthetic import questions as stream_forms
from flash_vstream.synthetic.annotations import Annotation
from flash_vstream.synthetic.captions import sentence
from flash_vstream.synthetic.events import as_event
from flash_vstream.synthetic.short_questions import short_questions
from flash_vstream.train.annotated import AnnotatedFeatures, AnnotatedPictures, grid_sides
from flash_vstream.train.config import load_settings
from flash_vstream.train.fitting import fit


@dataclass(frozen=True)
class ShortAnswersConfig:
    """A run of training; see ``configs/nano-short-answers.yaml``.

    ``least`` is how many pictures must have an answer for it to be one of the classifier's.
    """

    model: str
    steps: int
    batch_size: int
    learning_rate: float
    width: int = 256
    least: int = 4
    weight_decay: float = 0.05
    train_split: str = "train"
    val_split: str = "val"
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> "ShortAnswersConfig":
        """Read a YAML file; raises ``UserError`` naming what is wrong with it."""
        return load_settings(cls, path)


@dataclass(frozen=True)
class Asked:
    """Questions with answers about pictures: the texts, and for each pair the numbers of picture, text and answer."""

    texts: list[str]
    pairs: Tensor


LONG_FORMS = (
    *(stream_forms.NOW + stream_forms.AT + stream_forms.FIRST + stream_forms.LAST + stream_forms.STORY),
    *(stream_forms.OCCURRED + stream_forms.BEFORE + stream_forms.AFTER + stream_forms.WHEN),
    "What is happening in the picture?",
    "Tell me about this.",
    "Was there {x}?",
    "Why is there {x}?",
    "When did you last see {x}?",
)
"""Questions that no short answer answers."""
CLOSED = 2
"""Closed questions of each kind that are drawn at a time."""


def long_questions(annotation: Annotation, rng: random.Random) -> list[tuple[str, str]]:
    """Two questions about a picture that have no short answer."""
    event = as_event(sentence(rng.choice([annotation.caption, annotation.short])))
    time = stamp(rng.randrange(4000))
    return [(form.format(x=event, t=time), NONE) for form in rng.sample(LONG_FORMS, 2)]


def frequent_answers(shown: AnnotatedPictures, least: int, seed: int) -> list[str]:
    """``NONE``, and the answers that at least ``least`` pictures have, the most frequent first."""
    rng = random.Random(f"answers/{seed}")
    closed = shown.closed_questions
    counts = Counter(
        answer
        for key in shown.keys
        for answer in sorted({answer for _, answer in _answered(shown.annotations[key], closed.of(key, rng), rng)})
    )
    return [answer for answer, count in counts.most_common() if count >= least]


def asked_of(pictures: AnnotatedPictures, answers: Sequence[str], seed: int, repeats: int = 1) -> Asked:
    """The questions about all pictures whose answers are among ``answers``."""
    number = {answer: i for i, answer in enumerate(answers)}
    closed = pictures.closed_questions
    texts: dict[str, int] = {}
    pairs = set()
    for turn in range(repeats):  # a question that has several wordings is drawn again
        rng = random.Random(f"asked/{seed}/{turn}")
        for row, key in enumerate(pictures.keys):
            for question, answer in _answered(pictures.annotations[key], closed.draw(key, rng, CLOSED), rng):
                if answer in number:
                    pairs.add((row, texts.setdefault(question, len(texts)), number[answer]))
    return Asked(list(texts), torch.tensor(sorted(pairs)))


def _answered(
    annotation: Annotation, closed: Sequence[tuple[str, str]], rng: random.Random
) -> Sequence[tuple[str, str]]:
    return *short_questions(annotation, rng), *closed, *long_questions(annotation, rng)


def train_short_answers(
    config: ShortAnswersConfig, model_folder: Path, folders: Sequence[Path], output: Path
) -> dict[str, Any]:
    """Train on prepared folders; writes ``short_answers.safetensors``, its config and a check to ``output``.

    Goes on from ``short-answers-checkpoint.pt`` there when an earlier run was stopped.
    """
    torch.manual_seed(config.seed)
    shown, unseen = (AnnotatedFeatures(folders, split) for split in (config.train_split, config.val_split))
    answers = frequent_answers(shown, config.least, config.seed)
    model = FlashVStreamForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoProcessor.from_pretrained(model_folder).tokenizer
    words = Words(tokenizer, model.get_input_embeddings().weight)  # type: ignore[arg-type]
    network = ShortAnswers(shown.maps.shape[-1], words.table.shape[1], answers, config.width)
    output.mkdir(parents=True, exist_ok=True)
    asked = asked_of(shown, answers, config.seed, repeats=3)
    sides = grid_sides(shown.maps.shape[-2])

    def loss(rng: random.Random, generator: torch.Generator) -> Tensor:
        chosen = asked.pairs[torch.randint(0, len(asked.pairs), (config.batch_size,), generator=generator)]
        frames = pool_grid(shown.draw(chosen[:, 0], generator), rng.choice(sides))
        embeddings, mask = words.embed([asked.texts[text] for text in chosen[:, 1].tolist()])
        return short_answers_loss(network, embeddings, mask, frames, chosen[:, 2])

    fit(network, "short answers", config, output / "short-answers-checkpoint.pt", loss)
    result = check(network, unseen, unseen.whole(torch.arange(len(unseen.keys))), words, config.seed)
    save_network(network, "short_answers", output, network.config())
    (output / "short-answers-check.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def short_answers_loss(
    network: ShortAnswers, embeddings: Tensor, mask: Tensor, frames: Tensor, answers: Tensor
) -> Tensor:
    """Cross entropy of the ``answers [n]`` to questions (see ``ShortAnswers.forward``)."""
    return functional.cross_entropy(network(embeddings, mask, frames), answers, label_smoothing=0.05)


@torch.inference_mode()
def check(network: ShortAnswers, unseen: AnnotatedPictures, maps: Tensor, words: Words, seed: int) -> dict[str, Any]:
    """The share of right answers about unseen pictures with features ``maps [N, P², D]``.

    It is given for the annotations' own questions, the number of people, yes/no questions and choices, and for all.

    An answer that is not one of the network's counts as wrong.
    """
    network.eval()
    number = {answer: i for i, answer in enumerate(network.answers)}
    rng = random.Random(f"check/{seed}")
    closed = unseen.closed_questions
    right: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(unseen.keys), 64):
        keys = list(enumerate(unseen.keys))[at : at + 64]
        asked = [(row, *pair) for row, key in keys for pair in short_questions(unseen.annotations[key], rng)]
        extra = [(row, *pair) for row, key in keys for pair in closed.draw(key, rng, CLOSED)]
        embeddings, mask = words.embed([question for _, question, _ in asked + extra])
        best = network(embeddings, mask, maps[[row for row, _, _ in asked + extra]]).argmax(1).tolist()
        for (row, question, answer), found in zip(asked, best, strict=False):
            own = {text for text, _ in unseen.annotations[unseen.keys[row]].qa}
            hit = number.get(answer) == found
            right["all"].append(hit)
            if question in own:
                right["own"].append(hit)
            elif "people" in question or "persons" in question:
                right["people"].append(hit)
        for (_, _, answer), found in zip(extra, best[len(asked) :], strict=True):
            right[answer if answer in (YES, NO) else "choice"].append(number.get(answer) == found)
    return {kind: round(sum(hits) / max(1, len(hits)), 4) for kind, hits in right.items()}
