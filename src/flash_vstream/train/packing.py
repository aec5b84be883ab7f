"""Many questions on one stream in one training sequence.

A sequence is a tree of segments. The memory's prefix is the root; every question hangs from it (or
from the answer before, in a dialogue), and every answer from its question. A token sees its own
segment up to itself and the segments above it, and takes the position it would have if they alone
came before it. So each answer is trained exactly as it is asked for at run time, while the prefix,
which is most of the work, is computed once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from flash_vstream.memory import MemoryView
from flash_vstream.models.processing import FlashVStreamProcessor

IGNORE = -100


@dataclass(frozen=True)
class Mention:
    """An event as a question names it, and the stretch of the stream that shows it (None: nothing does)."""

    text: str
    span: tuple[float, float] | None


@dataclass(frozen=True)
class Turn:
    """A question and its answers; several answers are alternatives, each trained alone.

    ``mentions`` are the events that the question names, in the order of its text. Without answers a
    turn is the beginning of a question, up to an event that it names: it is there to be looked up.
    """

    question: str
    answers: tuple[str, ...]
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Gaze:
    """Where a token should look: from ``place`` in the sequence to the tokens ``slots`` of the memory.

    No slots: to none of them, since the stream does not show what is asked for.
    """

    place: int
    slots: tuple[int, ...]


@dataclass
class Packed:
    """One training sequence: ``ids``, ``labels``, ``positions`` of length L and the tree.

    ``blind`` questions do not see the memory. ``gazes`` and ``temporal`` (the places of the temporal
    memory's tokens) are for ``train/looking.py``.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    gazes: list[Gaze] = field(default_factory=list)
    temporal: list[int] = field(default_factory=list)
    blind: bool = False

    def add(self, ids: Sequence[int], parent: int, train_from: int | None = None) -> int:
        """Append a segment below ``parent`` (-1 for the root); labels begin at ``train_from``."""
        start = self.ends[parent] if parent >= 0 else 0
        number = len(self.parents)
        self.ids += ids
        self.labels += [IGNORE if train_from is None or i < train_from else token for i, token in enumerate(ids)]
        self.positions += range(start, start + len(ids))
        self.segments += [number] * len(ids)
        self.parents.append(parent)
        self.ends.append(start + len(ids))
        return number

    def mask(self) -> Tensor:
        """Which token sees which, ``[L, L]`` bool."""
        count = len(self.parents)
        sees = torch.zeros(count, count, dtype=torch.bool)
        for segment, parent in enumerate(self.parents):
            if parent >= 0 and not self.blind:
                sees[segment] = sees[parent]
            sees[segment, segment] = True
        of = torch.tensor(self.segments)
        return sees[of[:, None], of[None, :]].tril()


def pack(
    processor: FlashVStreamProcessor,
    view: MemoryView | None,
    turns: Sequence[Turn],
    independent: bool = True,
) -> Packed:
    """The training sequence of ``turns`` asked of ``view`` (None for plain chat).

    ``independent`` turns are each asked of the stream alone; otherwise they are one dialogue, each
    after the first answer of the one before.
    """
    template = processor.template
    opening, _, _ = template.first_question.partition("{}")
    packed = Packed(blind=not any(turn.answers for turn in turns))
    slots: list[tuple[float, float, list[int]]] = []
    if view is not None:
        root = packed.add(processor.prefix_ids(view), -1)
        slots = _temporal_slots(processor.slot_of_token(packed.ids, view), view)
        packed.temporal = [place for _, _, places in slots for place in places]
    else:
        root = packed.add(processor.tokenize(opening), -1)
    above = root
    for i, turn in enumerate(turns):
        form = template.first_question[len(opening) :] if independent or i == 0 else template.question
        question, ends = _question_ids(processor, form if turn.answers else "{}", turn)
        start = len(packed.ids)
        # The last token of the prompt begins every answer: it is the one that predicts its first.
        asked = packed.add(question[:-1] if turn.answers else question, root if independent else above)
        packed.gazes += [
            Gaze(start + end - 1, _showing(slots, mention.span))
            for end, mention in zip(ends, turn.mentions, strict=False)
        ]
        for j, answer in enumerate(turn.answers):
            ids = question[-1:] + processor.tokenize(template.answer.format(answer).rstrip("\n"), first=False)
            end = packed.add(ids, asked, train_from=1)
            above = end if j == 0 else above
    return packed


def _question_ids(processor: FlashVStreamProcessor, form: str, turn: Turn) -> tuple[list[int], list[int]]:
    """Ids of a question in its form, and for each event that it mentions the number of ids up to its end.

    No ends where the tokens do not part at an event's end.
    """
    text = form.format(turn.question)
    whole = processor.tokenize(text, first=False)
    cuts, at = [0], 0
    for mention in turn.mentions:
        at = text.index(mention.text, at) + len(mention.text)
        cuts.append(at)
    pieces = [processor.tokenize(text[a:b], first=False) for a, b in pairwise([*cuts, len(text)])]
    if [i for piece in pieces for i in piece] != whole:
        return whole, []
    return whole, [sum(map(len, pieces[:n])) for n in range(1, len(pieces))]


def _temporal_slots(slot_of_token: Tensor, view: MemoryView) -> list[tuple[float, float, list[int]]]:
    """Start, end and places in a prefix of each temporal slot; the abstract ones come before them."""
    spans = zip(view.temporal.start.tolist(), view.temporal.end.tolist(), strict=True)
    return [
        (start, end, (slot_of_token == number).nonzero()[:, 0].tolist())
        for number, (start, end) in enumerate(spans, len(view.abstract))
    ]


def _showing(slots: Sequence[tuple[float, float, list[int]]], span: tuple[float, float] | None) -> tuple[int, ...]:
    """Places of the slots that hold frames of a stretch of the stream."""
    if span is None:
        return ()
    return tuple(place for start, end, places in slots if start <= span[1] and end >= span[0] for place in places)


def collate(sequences: Sequence[Packed], pad: int, multiple: int = 8) -> dict[str, Tensor]:
    """Batch of packed sequences, padded to a ``multiple``, which matrix products like.

    ``attention_mask`` is additive, ``[B, 1, L, L]`` float32; padding sees itself alone, which
    keeps its softmax finite.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    width = -(-longest // multiple) * multiple
    shape = (len(sequences), width)
    batch = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    sees = torch.eye(width, dtype=torch.bool).repeat(len(sequences), 1, 1)
    for i, sequence in enumerate(sequences):
        length = len(sequence.ids)
        batch["input_ids"][i, :length] = torch.tensor(sequence.ids)
        batch["labels"][i, :length] = torch.tensor(sequence.labels)
        batch["position_ids"][i, :length] = torch.tensor(sequence.positions)
        sees[i, :length, :length] = sequence.mask()
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": mask[:, None], **_gazes(sequences, width)}


def _gazes(sequences: Sequence[Packed], width: int) -> dict[str, Tensor]:
    """What ``train/looking.py`` needs of a batch; nothing where no question mentions an event.

    ``gaze_rows [n, 2]``: sequence and place of the token that looks; ``gaze_targets [n, width]``: the
    places it should look at; ``gaze_slots [B, width]``: those of the temporal memory. ``gaze_across``
    is there when the questions are blind, so that they may be compared with the other streams too.
    """
    rows = [(i, gaze.place) for i, sequence in enumerate(sequences) for gaze in sequence.gazes]
    if not rows:
        return {}
    targets = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, gaze in enumerate(gaze for sequence in sequences for gaze in sequence.gazes):
        targets[n, list(gaze.slots)] = True
    slots = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        slots[i, sequence.temporal] = True
    told = {"gaze_rows": torch.tensor(rows), "gaze_targets": targets, "gaze_slots": slots}
    return told | ({"gaze_across": torch.ones(())} if all(sequence.blind for sequence in sequences) else {})
