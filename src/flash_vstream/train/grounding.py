"""Train grounding: which words of a question name an event, and which picture shows that event.

Training takes minutes, because only the embedding table of the language model is used. The matching
loss is contrastive within a batch: each event against all pictures, and each picture against all
events. Parts of captions are events too, and match every picture whose captions contain their words.
Questions are generated from templates and events, so the words that name an event are known exactly.
"""

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoProcessor

from flash_vstream.errors import UserError
from flash_vstream.memory import pool_grid
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.grounding import (
    Grounder,
    Grounding,
    Member,
    Words,
    soft_best,
)
from flash_vstream.models.small_networks import save_network
from flash_vstream.synthetic import questions
from flash_vstream.synthetic.captions import PictureSet
from flash_vstream.synthetic.events import Events, as_event, content_words
from flash_vstream.train.config import load_settings
from flash_vstream.train.fitting import run_steps

PARTS_OF_CAPTIONS = 0.3
"""The share of events that are only part of a caption."""
PHRASES = 0.15
"""The share of events that name a single object, where pictures are annotated."""
DROPPED_WORDS = 0.1
LEAST_CAPTIONS = 8
"""The number of captions a word must appear in to be in the vocabulary."""
WORDS_WEIGHT = 0.05
RIVALS = 7
"""How many other pictures an event's own is compared with in a check."""
NEAR = 12
"""How many of a picture's most similar pictures count as near."""
FEW, MANY = 16, 128
"""The most scenes of a short stream and those of a long one, for which thresholds are measured."""
MEAN_FEW = (1 + FEW) / 2
"""What the threshold is for; from there on it rises with the logarithm of the number of scenes."""
HARD = 0.3
"""The share of a batch's pictures that are chosen for being similar to another one in the batch."""
FORMS = (
    *(questions.OCCURRED + questions.BEFORE + questions.AFTER + questions.ORDER + questions.VALID + questions.WHEN),
    "Was there {x}?",
    "Were there {x}?",
    "Is there {x}?",
    "Did you notice {x}?",
    "Did {x} appear?",
    "Did {x} happen?",
    "Have you seen {x}?",
    "Do you see {x} now?",
    "Has there been {x} so far?",
    "Did the video show {x}?",
    "When was there {x}?",
    "When did {x} appear?",
    "Tell me when you saw {x}.",
    "What came after {x}?",
    "What happened before {x}?",
    "Did {x} come after {y}?",
    "Was {x} earlier than {y}?",
    "Which was first, {x} or {y}?",
    "Where was {x}?",
    "Did you see {x} or {y}?",
)
"""Questions that name events: more than the language model is trained on, to cover other wordings too."""
NO_EVENT = (
    *(questions.NOW + questions.FIRST + questions.LAST + questions.STORY),
    *(form.format(t=time) for form in questions.AT for time in ("0s", "7s", "12s", "45s", "103s")),
    "Who are you?",
    "Hello, how are you?",
    "Thank you.",
    "What can you do?",
    "Tell me a joke.",
    "How many people are there?",
    "What colour is it?",
    "What is the man doing?",
    "Where is this?",
    "What changed?",
    "Why?",
)


@dataclass(frozen=True)
class GroundingConfig:
    """Settings of a grounding training run; see ``configs/nano-grounding.yaml``."""

    model: str
    steps: int
    batch_size: int
    learning_rate: float
    split: str = "train"
    checked_on: str = "val"
    weight_decay: float = 0.1
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> "GroundingConfig":
        """Load a YAML config. Raises ``UserError`` with the reason when it is invalid."""
        return load_settings(cls, path)


class Vocabulary(nn.Module):
    """The frequent words of the captions, as an auxiliary target: which words belong to which picture.

    The target for a word is the share of a picture's captions (five in Flickr8k) that contain it. A
    per-word bias absorbs the word's overall frequency, so the evidence must come from the picture.
    """

    embeddings: Tensor
    shares: Tensor

    def __init__(self, captions: Sequence[Sequence[str]], words: Words):
        super().__init__()
        bags = [[set(content_words(text)) for text in texts] for texts in captions]
        counts = Counter(word for texts in bags for bag in texts for word in bag)
        self.words = sorted(word for word, count in counts.items() if count >= LEAST_CAPTIONS)
        index = {word: i for i, word in enumerate(self.words)}
        self.register_buffer("embeddings", words.embed_words(self.words).cpu(), persistent=False)
        self.register_buffer("shares", torch.zeros(len(bags), len(self.words)), persistent=False)
        for row, texts in enumerate(bags):
            for bag in texts:
                self.shares[row, [index[word] for word in bag if word in index]] += 1 / len(texts)
        self.bias = nn.Parameter(torch.logit(self.shares.mean(0).clamp(1e-5, 1 - 1e-5)))
        self.scale = nn.Parameter(torch.tensor(12.0).log())

    def loss(self, member: Member, sights: Tensor, rows: Sequence[int]) -> Tensor:
        """Cross entropy of the predicted words, summed over words and averaged over pictures."""
        evidence = soft_best(member.vocabulary(self.embeddings), sights, self.scale.exp()).T + self.bias
        shares = self.shares[list(rows)]
        return functional.binary_cross_entropy_with_logits(evidence, shares, reduction="sum") / len(shares)


class DescribedPictures:
    """Pictures as grounding is trained on them: their captions, the events these name, and which resemble one another.

    ``phrases`` are further events of a picture, which may also fit others.
    """

    def __init__(
        self,
        captions: Mapping[str, Sequence[str]],
        words: Words,
        phrases: Mapping[str, Sequence[str]] | None = None,
    ):
        self.captions = captions
        self.phrases = phrases or {}
        self.keys = sorted(captions)
        self.index = {key: row for row, key in enumerate(self.keys)}
        self.events = Events(captions)
        self.words = [set(content_words(" ".join([*captions[key], *self.phrases.get(key, ())]))) for key in self.keys]
        self.vocabulary = Vocabulary([captions[key] for key in self.keys], words)

    def batch(self, size: int, rng: random.Random) -> list[int]:
        """Rows of distinct pictures, some of them similar to others in the batch."""
        size = min(size, len(self.keys))
        rows = rng.sample(range(len(self.keys)), round(size * (1 - HARD)))
        while len(rows) < size:
            like = [self.index[key] for key in self.events.likely(self.keys[rng.choice(rows)])[:NEAR]]
            # Few pictures may be similar to none that is not in the batch already.
            rows.append(rng.choice(like if set(like) - set(rows) else range(len(self.keys))))
            rows = list(dict.fromkeys(rows))
        return rows

    def event(self, row: int, rng: random.Random) -> tuple[str, bool]:
        """An event of a picture, and whether it is only part of a description, which may also fit other pictures."""
        phrases = self.phrases.get(self.keys[row])
        if phrases and rng.random() < PHRASES:
            return rng.choice(phrases), True
        caption = as_event(rng.choice(self.captions[self.keys[row]]))
        if rng.random() < PARTS_OF_CAPTIONS:
            return part_of(caption, rng), True
        return " ".join(word for word in caption.split() if rng.random() > DROPPED_WORDS) or caption, False


class LoadedPictures(DescribedPictures):
    """A ``PictureSet`` with all its features in memory."""

    def __init__(self, pictures: PictureSet, words: Words):
        super().__init__(pictures.captions, words)
        with safe_open(pictures.path, "pt") as file:
            self.features = torch.stack([file.get_tensor(key) for key in self.keys])  # [N, VIEWS, P², D]

    def draw(self, rows: Sequence[int]) -> Tensor:
        """Features ``[n, P², D]`` of pictures: the mean of two views, as a slot averages several frames of a scene."""
        views = torch.randint(0, self.features.shape[1], (2, len(rows)))
        return self.features[rows, views].float().mean(0)


def part_of(caption: str, rng: random.Random) -> str:
    """A run of consecutive words of a caption, most often from its beginning."""
    words = caption.split()
    if len(words) < 4:
        return caption
    count = rng.randint(2, len(words) // 2 + 1)
    begin = rng.choice((0, rng.randint(0, len(words) - count)))
    return " ".join(words[begin : begin + count])


def comparison_loss(
    member: Member,
    vocabulary: Vocabulary,
    words: Words,
    data: DescribedPictures,
    rows: list[int],
    shown: Tensor,
    rng: random.Random,
) -> Tensor:
    """Contrastive cross entropy between events and pictures, both ways, plus the weighted vocabulary loss.

    ``shown [n, P², D]`` are the features of the pictures ``rows``.
    """
    side = math.isqrt(shown.shape[1])
    sides = [part for part in (side, side // 2, side // 2, side // 4) if part]
    sights = member.sights(pool_grid(shown, rng.choice(sides)))
    drawn = [data.event(row, rng) for row in rows]
    also_true = _also_true(drawn, [data.words[row] for row in rows])
    embeddings, mask = words.embed([" " + text for text, _ in drawn])
    scores = member.compare(member.events(embeddings, mask), sights)
    scores = scores.masked_fill(also_true.to(scores.device), -1e4)
    targets = torch.arange(len(rows), device=scores.device)
    contrastive = (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)) / 2
    return contrastive + WORDS_WEIGHT * vocabulary.loss(member, sights, rows)


def _also_true(drawn: Sequence[tuple[str, bool]], described: Sequence[set[str]]) -> Tensor:
    """Which pictures an event fits, ``[n, n]``, beside its own: for parts of descriptions, all that have its words."""
    with_word: dict[str, set[int]] = {}
    for number, words in enumerate(described):
        for word in words:
            with_word.setdefault(word, set()).add(number)
    everywhere, fits = set(range(len(described))), torch.zeros(len(drawn), len(described), dtype=torch.bool)
    for number, (text, part) in enumerate(drawn):
        if part:
            shared = everywhere.intersection(*(with_word.get(word, set()) for word in content_words(text)))
            fits[number, list(shared - {number})] = True
    return fits


def marking_loss(member: Member, words: Words, data: DescribedPictures, count: int, rng: random.Random) -> Tensor:
    """Cross entropy of the prediction, per question token, of whether it is part of an event."""
    generated = [question_with_events(data, rng) for _ in range(count)]
    embeddings, mask, offsets = words.embed_with_spans([text for text, _ in generated])
    inside = torch.zeros(mask.shape)
    for row, (_, spans) in enumerate(generated):
        for place, (begin, end) in enumerate(offsets[row]):
            inside[row, place] = any(begin < span[1] and end > span[0] for span in spans)
    marks = member.marks(embeddings, mask)
    return functional.binary_cross_entropy_with_logits(marks[mask], inside.to(marks.device)[mask])


def question_with_events(data: DescribedPictures, rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A generated question and the character spans of its events."""
    if rng.random() < 0.12:
        return rng.choice(NO_EVENT), []
    form = rng.choice(FORMS)
    text, spans, at = "", [], 0
    for name in ("{x}", "{y}"):
        begin = form.find(name)
        if begin < 0:
            continue
        event = data.event(rng.randrange(len(data.keys)), rng)[0]
        text += form[at:begin]
        spans.append((len(text), len(text) + len(event)))
        text += event
        at = begin + len(name)
    text += form[at:]
    if rng.random() < 0.15:
        text = text[:1].lower() + text[1:].rstrip("?.")
    return text, spans


@dataclass(frozen=True)
class Check:
    """Grounding quality on pictures that were not trained on.

    - ``picked``: how often an event's own picture scores higher than ``RIVALS`` others.
    - ``occurrence``, ``hard``: balanced accuracy at deciding whether any of 1 to 16 pictures shows an
      event. In ``hard``, absent events come from a picture similar to one of those shown.
    - ``marked``: the share of questions whose events are marked exactly.
    - ``threshold``: the score threshold that works best for ``occurrence`` and ``hard`` together.
    - ``many``: ``occurrence`` among 128 pictures, and ``slope`` how the best threshold rises with the logarithm of
      their number.
    """

    picked: float
    occurrence: float
    hard: float
    marked: float
    threshold: float
    many: float
    slope: float


@torch.inference_mode()
def check(grounding: Grounding, words: Words, data: DescribedPictures, shown: Tensor, seed: int = 0) -> Check:
    """Measure ``grounding`` on pictures ``shown [N, P², D]`` at half resolution, as temporal slots store them."""
    grounding.eval()
    rng = random.Random(f"check/{seed}")
    slots = pool_grid(shown, max(1, math.isqrt(shown.shape[1]) // 2))
    events = [as_event(text) for key in data.keys for text in data.captions[key]]
    of = torch.tensor([data.index[key] for key in data.keys for _ in data.captions[key]])
    scores = torch.cat([_scores(grounding, words, part, slots) for part in _chunks(events, 128)])
    own = scores[torch.arange(len(of)), of]
    rivals = scores.gather(1, _others(of, len(slots), seed))
    best = {hard: _tell_apart(scores, of, data, rng, hard) for hard in (False, True)}
    seen, unseen = (torch.cat([best[hard][i] for hard in best]) for i in (0, 1))
    threshold = _best_threshold(seen, unseen)
    occurrence, look_alike = (_balanced(*best[hard], threshold) for hard in best)
    most = min(MANY, len(slots) - 2)
    long = _tell_apart(scores, of, data, rng, False, scenes=(most, most))
    high = _best_threshold(*long)
    slope = max(0.0, (high - threshold) / math.log(most / MEAN_FEW)) if most > FEW else 0.0
    generated = [question_with_events(data, rng) for _ in range(200)]
    spans = Grounder(grounding, words).spans([text for text, _ in generated])
    marked = sum(found == list(true) for found, (_, true) in zip(spans, generated, strict=True)) / len(generated)
    picked = float((rivals < own[:, None]).all(1).float().mean())
    return Check(picked, occurrence, look_alike, marked, threshold, _balanced(*long, high), slope)


def _balanced(seen: Tensor, unseen: Tensor, threshold: float) -> float:
    """The mean of the shares of seen events above a threshold and of unseen ones below."""
    return float(((seen > threshold).float().mean() + (unseen <= threshold).float().mean()) / 2)


def _best_threshold(seen: Tensor, unseen: Tensor) -> float:
    candidates = torch.cat([seen, unseen]).unique().tolist()
    return float(max(candidates, key=lambda at: _balanced(seen, unseen, at)))


def _others(of: Tensor, pictures: int, seed: int) -> Tensor:
    """For each row in ``of [n]``, the rows of up to ``RIVALS`` different other pictures ``[n, k]``."""
    chances = torch.rand(len(of), pictures, generator=torch.Generator().manual_seed(seed))
    chances.scatter_(1, of[:, None], -1.0)
    return chances.topk(min(RIVALS, pictures - 1)).indices


def _chunks(texts: list[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(texts), size):
        yield texts[begin : begin + size]


def _scores(grounding: Grounding, words: Words, texts: Sequence[str], slots: Tensor) -> Tensor:
    embeddings, mask = words.embed([" " + text for text in texts])
    return grounding.compare(embeddings, mask, [slots]).cpu()


def _tell_apart(
    scores: Tensor,
    of: Tensor,
    data: DescribedPictures,
    rng: random.Random,
    hard: bool,
    count: int = 1500,
    scenes: tuple[int, int] = (1, FEW),
) -> tuple[Tensor, Tensor]:
    """The best scores over some pictures, for events that one of them shows and for absent events."""
    rows = [(of == row).nonzero()[:, 0].tolist() for row in range(len(data.keys))]
    seen, unseen = [], []
    for _ in range(count):
        stream = rng.sample(range(len(rows)), min(rng.randint(*scenes), len(rows) - 1))
        seen.append(scores[rng.choice(rows[rng.choice(stream)]), stream].max())
        absent = [row for row in range(len(rows)) if row not in stream]
        if hard:
            near = [data.index[key] for key in data.events.likely(data.keys[rng.choice(stream)])[:NEAR]]
            absent = [row for row in near if row not in stream] or absent
        unseen.append(scores[rng.choice(rows[rng.choice(absent)]), stream].max())
    return torch.stack(seen), torch.stack(unseen)


def train_grounding(config: GroundingConfig, model_folder: Path, data: Path, output: Path) -> dict[str, Any]:
    """Train a model's grounding on a prepared folder; write ``grounding.safetensors`` and ``check.json``.

    The ensemble members are trained one after another, each with its own seed. Rerunning the same command goes on
    from the last checkpoint.
    """
    torch.manual_seed(config.seed)
    processor: Any = AutoProcessor.from_pretrained(model_folder)
    model = FlashVStreamForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    if model.grounding is None:
        raise UserError(f"{model_folder} has no grounding to train; its config lacks grounding_config")
    words = Words(processor.tokenizer, model.get_input_embeddings().weight)  # type: ignore[arg-type]
    shown, unseen = (LoadedPictures(PictureSet.load(data, split), words) for split in (config.split, config.checked_on))
    grounding = model.grounding.requires_grad_(True)
    output.mkdir(parents=True, exist_ok=True)
    for number, member in enumerate(grounding.each()):
        kept = output / f"checkpoint-{number + 1}.pt"
        _fit(member, words, shown, replace(config, seed=config.seed + number), kept)
    grounding.eval()
    grounding.choose_common(shown.features[:, 0], words, shown.vocabulary.words)
    result = check(grounding, words, unseen, unseen.features[:, 0].float())
    grounding.threshold.data.fill_(result.threshold)
    grounding.slope.data.fill_(result.slope)
    config_with_words = model.config.grounding_config | {"vocabulary": grounding.vocabulary}
    save_network(grounding, "grounding", output, config_with_words)
    (output / "check.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return asdict(result)


def _fit(member: Member, words: Words, data: LoadedPictures, config: GroundingConfig, kept: Path) -> None:
    """Train one member, resuming from the checkpoint ``kept`` if it exists."""
    vocabulary = copy.deepcopy(data.vocabulary)
    groups = [
        {"params": [*member.parameters()], "weight_decay": config.weight_decay},
        {"params": [*vocabulary.parameters()], "weight_decay": 0.0},
    ]
    rate, steps = config.learning_rate, config.steps
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    parts = {"member": member, "vocabulary": vocabulary, "optimizer": optimizer, "schedule": schedule}
    member.train()

    def loss(rng: random.Random) -> Tensor:
        torch.manual_seed(rng.getrandbits(63))
        rows = data.batch(config.batch_size, rng)
        compared = comparison_loss(member, vocabulary, words, data, rows, data.draw(rows), rng)
        return compared + marking_loss(member, words, data, max(1, config.batch_size // 4), rng)

    run_steps("grounding", config, kept, parts, loss, clip=1.0)
