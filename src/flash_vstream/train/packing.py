"""Pack many questions about one stream into one training sequence.

A sequence is a tree of segments. The memory prefix is the root. Each question is a child of the root
(or, in a dialogue, of the previous answer), and each answer is a child of its question. A token
attends to the segments above its own and to its own segment up to itself, and its position counts
only those. Every answer is therefore trained exactly as at inference, while the prefix, which is most
of the work, is computed once for all questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.synthetic.questions import Turn

IGNORE = -100


@dataclass
class Packed:
    """One training sequence: ``ids``, ``labels`` and ``positions`` of length L, plus the segment tree.

    It holds the first ``turns`` turns of those that were to be packed.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    turns: int = 0
    truncated: bool = False

    @property
    def is_chain(self) -> bool:
        """Whether each segment follows the one before, as in plain text: causal attention is then enough."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    def add(self, ids: Sequence[int], parent: int, train_from: int | None = None) -> int:
        """Append a segment under ``parent`` (-1 for the root) and return its number; labels start at ``train_from``."""
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
        """The attention mask ``[L, L]``, bool: True where a token (row) attends to another (column)."""
        count = len(self.parents)
        attends = torch.zeros(count, count, dtype=torch.bool)
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                attends[segment] = attends[parent]
            attends[segment, segment] = True
        of = torch.tensor(self.segments)
        return attends[of[:, None], of[None, :]].tril()


def pack(
    processor: FlashVStreamProcessor,
    snapshot: MemorySnapshot | None,
    turns: Sequence[Turn],
    independent: bool = True,
    max_length: int | None = None,
    cue: str = "",
    recalled: Sequence[Sequence[int]] = (),
) -> Packed:
    """The training sequence for ``turns`` about ``snapshot`` (None for plain chat).

    ``cue`` says in words what the newest frame shows, and ``recalled`` are the ids that stand before each turn's
    question for the frames that it recalls.

    With ``independent``, each turn sees only the stream. Otherwise the turns form one dialogue, in
    which each follows the first answer of the previous one.

    A sequence longer than ``max_length`` loses answers from its end, and the first answer its last tokens
    (``Packed.truncated``); the memory and the first question stay whole. Raises ``UserError`` when they
    leave no room.
    """
    template = processor.template
    opening, _, _ = template.first_question.partition("{}")
    answer_form, stop, after_stop = template.answer.partition(template.stop)
    packed = Packed()
    before = processor.tokenize(opening) if snapshot is None else processor.prefix_ids(snapshot, cue=cue)
    root = packed.add(before, -1)
    parent = root
    for i, turn in enumerate(turns):
        is_first = independent or i == 0
        form = template.first_question[len(opening) :] if is_first else after_stop + template.question
        text = "" if template.is_caption else form.format(turn.question)
        question = [*(recalled[i] if recalled else ()), *processor.tokenize(text, first=False)]
        answers = [processor.tokenize((answer_form + stop).format(answer), first=False) for answer in turn.answers]
        room = None if max_length is None else max_length - len(packed.ids) - len(question)
        fitting = _fitting(answers, room, whole=i > 0)
        packed.truncated |= fitting != answers
        if not fitting:
            if i == 0:
                raise UserError(
                    f"max_length {max_length} leaves no room for an answer beside {len(packed.ids) + len(question)}"
                    " tokens of memory and question; raise it, or give the model a smaller memory"
                )
            break
        parent = _add_turn(packed, question, fitting, root if independent else parent)
        packed.turns += 1
    return packed


def _fitting(answers: list[list[int]], room: int | None, whole: bool) -> list[list[int]]:
    """The answers that fit into ``room`` tokens; unless ``whole``, the first one is shortened to fit."""
    if room is None:
        return answers
    kept: list[list[int]] = []
    for ids in answers:
        # Every answer after the first repeats the question's last token.
        if len(ids) + bool(kept) > room and (kept or whole or room < 1):
            break
        kept.append(ids[:room])
        room -= len(kept[-1]) + (len(kept) > 1)
    return kept


def _add_turn(packed: Packed, question: list[int], answers: Sequence[list[int]], parent: int) -> int:
    """Append a question and its answers under ``parent``; returns the segment of the first answer."""
    # Every answer segment starts with the question's last token, which predicts the first answer token. Behind a
    # memory without a question (a caption), the memory's last token predicts it, for the one answer that follows it.
    segment = packed.add(question[:-1], parent) if question else parent
    ends: list[int] = []
    for ids in answers:
        follows = not question and not ends and len(packed.parents) == segment + 1
        ends.append(packed.add([*question[-1:], *ids], segment, train_from=0 if follows else 1))
    return ends[0]


def collate(sequences: Sequence[Packed], pad: int, multiple: int = 8, chains: bool = False) -> dict[str, Tensor]:
    """Batch packed sequences, padded to a ``multiple`` for fast matrix products.

    ``attention_mask`` is additive, ``[B, 1, L, L]`` float32. Padding attends only to itself, which
    keeps its softmax finite. With ``chains``, it is ``[B, L]``, 1 for tokens: causal attention, which flash
    kernels can compute; every sequence must be one chain of segments.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    width = -(-longest // multiple) * multiple
    shape = (len(sequences), width)
    batch = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    attends = torch.eye(0 if chains else width, dtype=torch.bool).repeat(len(sequences), 1, 1)
    shown = torch.zeros(shape, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        length = len(sequence.ids)
        batch["input_ids"][i, :length] = torch.tensor(sequence.ids)
        batch["labels"][i, :length] = torch.tensor(sequence.labels)
        batch["position_ids"][i, :length] = torch.tensor(sequence.positions)
        shown[i, :length] = 1
        if not chains:
            attends[i, :length, :length] = sequence.mask()
    if chains:
        return {**batch, "attention_mask": shown}
    # Finite in bfloat16 too, to which mixed precision casts it.
    mask = torch.zeros(attends.shape).masked_fill_(~attends, torch.finfo(torch.bfloat16).min)
    return {**batch, "attention_mask": mask[:, None]}
