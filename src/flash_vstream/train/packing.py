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

from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.synthetic.questions import Turn

IGNORE = -100


@dataclass
class Packed:
    """One training sequence: ``ids``, ``labels`` and ``positions`` of length L, plus the segment tree."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

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
) -> Packed:
    """The training sequence for ``turns`` about ``snapshot`` (None for plain chat).

    With ``independent``, each turn sees only the stream. Otherwise the turns form one dialogue, in
    which each follows the first answer of the previous one.
    """
    template = processor.template
    opening, _, _ = template.first_question.partition("{}")
    packed = Packed()
    if snapshot is not None:
        root = packed.add(processor.prefix_ids(snapshot), -1)
    else:
        root = packed.add(processor.tokenize(opening), -1)
    parent = root
    for i, turn in enumerate(turns):
        form = template.first_question[len(opening) :] if independent or i == 0 else template.question
        question = processor.tokenize(form.format(turn.question), first=False)
        # Every answer segment starts with the prompt's last token, which predicts the first answer token.
        segment = packed.add(question[:-1], root if independent else parent)
        for j, answer in enumerate(turn.answers):
            ids = question[-1:] + processor.tokenize(template.answer.format(answer).rstrip("\n"), first=False)
            end = packed.add(ids, segment, train_from=1)
            parent = end if j == 0 else parent
    return packed


def collate(sequences: Sequence[Packed], pad: int, multiple: int = 8) -> dict[str, Tensor]:
    """Batch packed sequences, padded to a ``multiple`` for fast matrix products.

    ``attention_mask`` is additive, ``[B, 1, L, L]`` float32. Padding attends only to itself, which
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
    attends = torch.eye(width, dtype=torch.bool).repeat(len(sequences), 1, 1)
    for i, sequence in enumerate(sequences):
        length = len(sequence.ids)
        batch["input_ids"][i, :length] = torch.tensor(sequence.ids)
        batch["labels"][i, :length] = torch.tensor(sequence.labels)
        batch["position_ids"][i, :length] = torch.tensor(sequence.positions)
        attends[i, :length, :length] = sequence.mask()
    mask = torch.zeros(attends.shape).masked_fill_(~attends, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": mask[:, None]}
