"""Grounding: locates the events named in a question in the memory before the language model reads it.

A small language model can describe what it sees but cannot find one scene among sixteen from a
sentence: asked whether, when or in which order things happened, it answers at chance level. So small
networks read the question first. They mark the words that name events and compare each event with
the memory's slots. The language model then reads the question with a note after each event: the
time of the most similar slot, a question mark if no slot is similar enough, and whether that time is
earlier or later than the previous event's: ``Did you see a dog in the snow (12s) before a man on a
bike (9s?, earlier)?`` The order is spelled out because comparing two numbers and answering yes or no
in one step is too hard for the model.

This is not in the paper, and the published models have no grounding (``grounding_config`` is None).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flash_vstream.memory import MemorySnapshot, Slots, pool_grid
from flash_vstream.models.prompts import stamp
from flash_vstream.models.remembered import Remembered
from flash_vstream.models.sight import PERSON, Presence, Sight

LONGEST = 96
"""Questions and events are truncated to this many tokens."""
WORD_SCALE, WORD_SHARPNESS = 12.0, 1.5
"""How similarities of single words become logarithms of probabilities; fitted on pictures that were not trained on."""
COMMON_SIDE = 2
"""The grid of a common picture: that of nano's temporal slots."""
FEW_SLOTS = 64
"""The number of slots up to which one threshold serves: some sixteen scenes, of a few frames each."""
IS_THERE = "Is there {thing} now{note}?"
WAS_THERE = "Was there {thing}{note}?"
_WORD = re.compile(r"\w+(?:['-]\w+)*")
_NO_EVENT = frozenset(
    _WORD.findall("""
    a an the this that these those there here it is are was were be been do did does has have had i you we they he she
    and or of in on at to from by with for about what which who when where how first last then now so far all any some
    scene scenes video clip stream picture image frame beginning start end moment time
    """)
)
"""Words that name no event, however many of them stand together."""


def looked_at(snapshot: MemorySnapshot) -> list[Slots]:
    """The filled parts of a memory that events are looked for in: those whose slots have times of their own.

    They begin with the long-term memory, if there is one. It then stands for the temporal memory, whose slots may mix
    several scenes, as abstract slots mix the whole stream.
    """
    past = snapshot.longterm if len(snapshot.longterm) else snapshot.temporal
    return [slots for slots in (past, snapshot.retrieved, snapshot.spatial) if len(slots)]


@dataclass(frozen=True)
class Mention:
    """An event named in a question, in characters ``begin`` to ``end`` (of its direct form, see ``direct_question``).

    ``time`` is the start of the most similar slot in seconds of stream time. ``score`` is the
    similarity minus the model's threshold; above 0, the event counts as ``seen``. ``thing`` is set if the question
    asks for nothing but the presence of a thing that sight knows, and names that thing; ``is_about_now`` if it asks
    for its presence now.
    """

    text: str
    begin: int
    end: int
    time: float
    score: float
    thing: str | None = None
    is_about_now: bool = False

    @property
    def seen(self) -> bool:
        """Whether the memory shows the event, as far as the model can tell."""
        return self.score > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"seen": self.seen}

    def note(self, before: "Mention | None" = None) -> str:
        """The note inserted after the event for the language model; ``before`` is the question's previous event."""
        doubt = "" if self.seen else "?"
        return f" ({stamp(self.time)}{doubt}{self._order(before)})"

    def _order(self, before: "Mention | None") -> str:
        if before is None:
            return ""
        return ", then too" if self.time == before.time else ", earlier" if self.time < before.time else ", later"


def annotate(question: str, mentions: Sequence[Mention]) -> str:
    """The question with a note after each of its events.

    A question about presence is put into one of two forms, whatever its wording.
    """
    if len(mentions) == 1 and (thing := mentions[0].thing) is not None:
        form = IS_THERE if mentions[0].is_about_now else WAS_THERE
        return form.format(thing=thing, note=mentions[0].note())
    text, at = "", 0
    for before, mention in zip((None, *mentions), mentions, strict=False):
        text += question[at : mention.end] + mention.note(before)
        at = mention.end
    return text + question[at:]


@dataclass(frozen=True)
class Event:
    """Encodings of m events of up to L tokens.

    ``whole [m, width]`` are unit vectors of whole events, ``words [m, L, width]`` unit vectors of
    their tokens, and ``counts [m, L]`` the tokens' weights (0 for padding).
    """

    whole: Tensor
    words: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ReadEvents:
    """m events as each member encodes them, and their similarity ``usual [m, 1]`` to common pictures."""

    members: list[Event]
    usual: Tensor


class Member(nn.Module):
    """A network of ``width`` channels that marks events in questions and compares them with slots.

    Text is given as embeddings ``[B, L, text_width]`` from ``Words``, slots as features
    ``[n, P², channels]``. A grounding averages several members.
    """

    def __init__(self, channels: int, text_width: int, width: int, heads: int):
        super().__init__()
        self.words = nn.Linear(text_width, width)
        self.places = nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        self.context = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.mark = nn.Linear(width, 1)
        self.attend = nn.Linear(width, 1)
        self.whole = nn.Linear(width, width)
        self.word = nn.Linear(width, width)
        self.count = nn.Linear(width, 1)
        nn.init.constant_(self.count.bias, -2.0)  # initially, the whole event counts for more than its words
        self.sight = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Dropout(0.2),
            nn.Linear(channels, 2 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(2 * width, width),
        )
        self.scales = nn.Parameter(torch.tensor([14.0, 8.0]).log())  # inverse temperatures of whole events and of words

    def read(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L, width]`` without and with context; ``mask [B, L]`` is False for padding."""
        words = self.words(embeddings.to(self.words.weight))
        placed = words + self.places[: embeddings.shape[1]]
        return words, self.context(placed, src_key_padding_mask=~mask)

    def marks(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, L]`` that each token of a question is part of an event."""
        logits: Tensor = self.mark(self.read(embeddings, mask)[1])[..., 0]
        return logits

    def events(self, embeddings: Tensor, mask: Tensor) -> Event:
        """Encodings of texts, each of which is one event."""
        words, states = self.read(embeddings, mask)
        shares = self.attend(states)[..., 0].masked_fill(~mask, -torch.inf).softmax(1)
        whole = self.whole((shares[..., None] * states).sum(1))
        counts = functional.softplus(self.count(states))[..., 0] * mask
        return Event(functional.normalize(whole, dim=-1), self._as_words(states + words), counts)

    def vocabulary(self, embeddings: Tensor) -> Tensor:
        """Unit vectors ``[W, width]`` of words ``[W, text_width]`` without context."""
        return self._as_words(self.words(embeddings.to(self.words.weight)))

    def _as_words(self, states: Tensor) -> Tensor:
        return functional.normalize(self.word(states), dim=-1)

    def sights(self, features: Tensor) -> Tensor:
        """Unit vectors ``[n, P², width]`` of the tokens of slots ``[n, P², channels]``."""
        return functional.normalize(self.sight(features.to(self.words.weight)), dim=-1)

    def compare(self, event: Event, sights: Tensor) -> Tensor:
        """Similarity ``[m, n]`` of m events and n slots ``[n, P², width]``.

        The whole event and each of its words are compared with the slot's most similar token (a soft maximum).
        """
        scales = self.scales.exp()
        whole = soft_best(event.whole, sights, scales[0])
        words = soft_best(event.words.flatten(0, 1), sights, scales[1]).unflatten(0, event.counts.shape)
        return whole + torch.einsum("ml,mln->mn", event.counts, words)


class Grounding(nn.Module):
    """An ensemble of independently trained members, whose outputs are averaged.

    Similarity is relative to ``common`` pictures: a vague event resembles many slots, a peculiar one few, and the
    contrastive loss does not see the difference. So the logarithm of the mean exponential similarity to ``common``
    training pictures is subtracted, as cohorts normalize scores in speaker verification (Auckenthaler et al. 2000).

    ``vocabulary`` are words that captions use, each with how well it fits the common pictures.

    An event counts as seen above the similarity ``threshold + slope · ln(n / 64)`` to the best of n > 64 slots; both
    are measured after training. Among more slots, one is more alike by chance.
    """

    common: Tensor
    threshold: Tensor
    slope: Tensor

    def __init__(
        self,
        channels: int,
        text_width: int,
        width: int = 256,
        heads: int = 4,
        members: int = 1,
        common: int = 0,
        vocabulary: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.members = nn.ModuleList(Member(channels, text_width, width, heads) for _ in range(members))
        # Unit vectors of the common pictures, times 127: a quarter of their size, and as good.
        self.register_buffer("common", torch.zeros(members, common, COMMON_SIDE**2, width, dtype=torch.int8))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("slope", torch.zeros(()))
        self.vocabulary = dict(vocabulary or {})

    def needed(self, slots: int) -> float:
        """What an event's best similarity among so many slots must exceed for it to count as seen."""
        return float(self.threshold) + float(self.slope) * math.log(max(slots, FEW_SLOTS) / FEW_SLOTS)

    def marks(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, L]`` that each token of a question is part of an event."""
        return torch.stack([member.marks(embeddings, mask) for member in self.each()]).mean(0)

    def compare(self, embeddings: Tensor, mask: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Similarity ``[m, n]`` of events, embedded as ``[m, L, text_width]``, and slots.

        ``parts`` are the slots' features ``[n', P², channels]``, one tensor for each grid size.
        """
        return self.compare_sights(self.read(embeddings, mask), [self.sights(part) for part in parts])

    def sights(self, features: Tensor) -> list[Tensor]:
        """What each member sees in slots ``[n, P², channels]``, as unit vectors ``[n, P², width]``."""
        return [member.sights(features) for member in self.each()]

    def read(self, embeddings: Tensor, mask: Tensor) -> ReadEvents:
        """What each member makes of events, embedded as ``[m, L, text_width]``."""
        events = [member.events(embeddings, mask) for member in self.each()]
        pairs = zip(self.each(), events, self.common, strict=True)
        usual = [member.compare(own, seen.to(own.whole) / 127) for member, own, seen in pairs]
        return ReadEvents(events, _log_mean_exp(torch.stack(usual).mean(0)))

    def compare_sights(self, events: ReadEvents, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Similarity ``[m, n]`` of events and slots given by their ``sights``."""
        scores = [
            torch.cat([member.compare(own, part[number]) for part in parts], dim=1)
            for number, (member, own) in enumerate(zip(self.each(), events.members, strict=True))
        ]
        return torch.stack(scores).mean(0) - events.usual

    def read_vocabulary(self, embeddings: Tensor) -> list[Tensor]:
        """Each member's unit vectors ``[W, width]`` of words ``[W, text_width]``."""
        return [member.vocabulary(embeddings) for member in self.each()]

    def word_fits(self, words: Sequence[Tensor], sights: Sequence[Tensor]) -> Tensor:
        """How well words, as ``read_vocabulary`` returns them, fit slots, as ``sights`` does: ``[W, n]``, in nats."""
        scale = torch.tensor(WORD_SCALE)
        fits = [soft_best(own, seen, scale) for own, seen in zip(words, sights, strict=True)]
        return WORD_SHARPNESS * torch.stack(fits).mean(0)

    @torch.inference_mode()
    def choose_common(self, features: Tensor, words: "Words", vocabulary: Sequence[str]) -> None:
        """Take the common pictures from feature maps ``[n, P², channels]``, and see how well a vocabulary fits them.

        They are taken evenly, and some more than once, if n is small.
        """
        rows = torch.linspace(0, len(features) - 1, self.common.shape[1], device=features.device).round().long()
        sights = self.sights(pool_grid(features[rows].float(), COMMON_SIDE))
        self.common.copy_((torch.stack(sights) * 127).round())
        fits = self.word_fits(self.read_vocabulary(words.embed_words(vocabulary)), sights)
        usual = _log_mean_exp(fits)[:, 0].tolist()
        self.vocabulary = {word: round(own, 3) for word, own in zip(vocabulary, usual, strict=True)}

    def each(self) -> list[Member]:
        """The members, typed."""
        return cast(list[Member], list(self.members))


def _log_mean_exp(similarities: Tensor) -> Tensor:
    """The logarithm of the mean exponential ``[m, 1]`` of ``[m, n]``; 0 for n = 0."""
    if not similarities.shape[1]:
        return similarities.new_zeros(len(similarities), 1)
    return similarities.logsumexp(1, keepdim=True) - math.log(similarities.shape[1])


def soft_best(texts: Tensor, sights: Tensor, scale: Tensor) -> Tensor:
    """Similarity ``[t, n]`` of texts ``[t, width]`` to slots ``[n, P², width]``: a soft maximum over tokens."""
    tokens = texts @ sights.flatten(0, 1).T * scale
    best: Tensor = tokens.unflatten(1, sights.shape[:2]).logsumexp(-1)
    return best - math.log(sights.shape[1])


class Words:
    """Embeds text for grounding: the language model's input embeddings, centred and scaled to one length.

    ``table`` holds those embeddings, ``[V, width]``. They give meaning even to words not seen in training.
    """

    def __init__(self, tokenizer: Any, table: Tensor):
        self.tokenizer = tokenizer
        self.table = table
        self.mean = table.detach().mean(0, dtype=torch.float32)

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, L, width]`` and a mask ``[B, L]`` (False: padding)."""
        return self._embedded(self._coded(texts).input_ids)

    def embed_with_spans(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
        """What ``embed`` returns, and each token's character span."""
        coded = self._coded(texts, return_offsets_mapping=True)
        return *self._embedded(coded.input_ids), coded.offset_mapping

    def _coded(self, texts: Sequence[str], **settings: Any) -> Any:
        return self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=LONGEST, **settings)

    def _embedded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(1, *(len(row) for row in rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        # A softmax over nothing is NaN.
        mask = torch.arange(longest) < torch.tensor([max(1, len(row)) for row in rows])[:, None]
        return self._scaled(self.table[ids.to(self.table.device)]), mask.to(self.table.device)

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """Embeddings ``[W, width]`` of single words, each the mean over its tokens."""
        if not words:
            return self.table.new_zeros(0, self.table.shape[1])
        rows = self.tokenizer([" " + word for word in words], add_special_tokens=False).input_ids
        tokens = self._scaled(self.table[[token for row in rows for token in row]])
        means = torch.segment_reduce(tokens.cpu(), "mean", lengths=torch.tensor([len(row) for row in rows]), axis=0)
        return means.to(self.table.device)

    def _scaled(self, embeddings: Tensor) -> Tensor:
        centred = embeddings.detach().float() - self.mean
        return functional.normalize(centred, dim=-1) * math.sqrt(centred.shape[-1])


class Grounder:
    """Locates the events named in questions in a memory, with a model's grounding and word embeddings."""

    def __init__(self, grounding: Grounding, words: Words, sight: Sight | None = None):
        self.grounding = grounding
        self.words = words
        self.sight = sight
        # A stream's long-term memory is looked through at every question, and changes by a frame at a time.
        self.sights = Remembered(self._sights)
        self.things = Remembered(self._things)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any) -> "Grounder | None":
        """The grounder of a model; None if the model has no grounding."""
        if getattr(model, "grounding", None) is None:
            return None
        return cls(model.grounding, Words(tokenizer, model.get_input_embeddings().weight), model.sight)

    def mentions(self, questions: Sequence[str], snapshot: MemorySnapshot) -> list[list[Mention]]:
        """The events named in each question, in order, each with the time and score of the most similar slot."""
        return [[mention for mention, _ in own] for own in self.locate(questions, snapshot)]

    @torch.inference_mode()
    def locate(self, questions: Sequence[str], snapshot: MemorySnapshot) -> list[list[tuple[Mention, Tensor]]]:
        """The events named in each question, each with its scores ``[n]`` for the slots of the long-term memory."""
        self.grounding.eval()
        present = [self.sight.presence(text) if self.sight is not None else None for text in questions]
        # A question about presence is sight's alone.
        spans = [[] if asked is not None else own for asked, own in zip(present, self.spans(questions), strict=True)]
        seen = self.shown(looked_at(snapshot)) if any(asked is not None for asked in present) else None
        named = [text[begin:end] for text, own in zip(questions, spans, strict=True) for begin, end in own]
        matches: Iterator[tuple[str, Tensor]] = iter(())
        if named:
            scores, times = self.compared(named, looked_at(snapshot))
            matches = zip(named, scores, strict=True)
        past = len(snapshot.longterm)
        located: list[list[tuple[Mention, Tensor]]] = []
        for question, asked, own in zip(questions, present, spans, strict=True):
            located.append([])
            if asked is not None and seen is not None:
                located[-1].append((self._presence(question, asked, *seen), torch.zeros(past)))
            for (begin, end), (text, row) in zip(own, matches, strict=False):
                best = int(row.argmax())
                mention = Mention(text, begin, end, times[best], round(float(row[best]), 3))
                located[-1].append((mention, row[:past]))
        return located

    def spans(self, questions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The character spans of the events in each question."""
        embeddings, mask, offsets = self.words.embed_with_spans(questions)
        marked = (self.grounding.marks(embeddings, mask) > 0).tolist()
        return [_runs(text, *row) for text, *row in zip(questions, marked, offsets, strict=True)]

    @torch.inference_mode()
    def look(self, snapshot: MemorySnapshot) -> None:
        """Look at the frames of a memory, so that the first question need not wait for it."""
        for slots in looked_at(snapshot):
            self.sights(slots.features)
            if self.sight is not None:
                self.things(slots.features)

    def _sights(self, features: Tensor) -> list[Tensor]:
        self.grounding.eval()
        return self.grounding.sights(features)

    def _things(self, features: Tensor) -> list[Tensor]:
        assert self.sight is not None
        self.sight.eval()
        return [self.sight.shown(features)]

    def shown(self, parts: Sequence[Slots]) -> tuple[Tensor, list[float]]:
        """What each slot of ``parts`` shows ``[n, V]``, in their order, and the slots' times."""
        things = torch.cat([self.things(slots.features)[0] for slots in parts])
        return things, [time for slots in parts for time in slots.start.tolist()]

    def _presence(self, question: str, asked: Presence, things: Tensor, times: list[float]) -> Mention:
        """Whether the slots show a thing: the newest frame for a question in the present tense, else any."""
        assert self.sight is not None
        begin = len(times) - 1 if asked.is_about_now else 0
        scores = things[begin:, asked.thing]
        best = int(scores.argmax())
        score = float(scores[best]) - self.sight.needed(len(set(times[begin:])))
        text = question[asked.begin : asked.end]
        thing = "a person" if self.sight.names[asked.thing] == PERSON else text
        time = times[begin + best]
        return Mention(text, asked.begin, asked.end, time, round(score, 3), thing, asked.is_about_now)

    def compared(self, named: Sequence[str], parts: Sequence[Slots]) -> tuple[Tensor, list[float]]:
        """The similarity ``[m, n]`` of m events and n slots, minus the threshold, and the slots' start times."""
        embeddings, mask = self.words.embed([" " + text for text in named])
        events = self.grounding.read(embeddings, mask)
        scores = self.grounding.compare_sights(events, [self.sights(slots.features) for slots in parts])
        times = [time for slots in parts for time in slots.start.tolist()]
        return scores - self.grounding.needed(len(set(times))), times


def _runs(text: str, marked: Sequence[bool], places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of a text whose words are marked, for the most part of their characters.

    Spans of words that name no event by themselves are left out.
    """
    covered = [False] * len(text)
    for part, (begin, end) in zip(marked, places, strict=False):  # the marks end in padding
        covered[begin:end] = [part] * (end - begin)
    runs: list[list[re.Match[str]]] = [[]]
    for word in _WORD.finditer(text):
        if 2 * sum(covered[word.start() : word.end()]) > len(word[0]):
            runs[-1].append(word)
        else:
            runs.append([])
    named = [run for run in runs if not all(word[0].lower() in _NO_EVENT for word in run)]
    return [(run[0].start(), run[-1].end()) for run in named]
