"""Memories in a prompt: where everything stands in it. Needs no Transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.models.interface import Layout
from flash_vstream.models.prompt_text import PromptText
from flash_vstream.models.prompts import VIDEO, layout, stamp


class PromptLayout(PromptText):
    """Turns text and memories into ids, and generated ids back into text."""

    def prefix_ids(self, snapshot: MemorySnapshot, time_stamps: bool = True, cue: str = "") -> list[int]:
        """Ids of a prompt up to its question: the part that can be read before a question is asked.

        ``time_stamps=False`` leaves out the times, for a model that was trained with them. ``cue`` says in words what
        the newest frame shows.
        """
        opening = self.template.first_question.partition("{}")[0] + VIDEO + self.template.video
        return self.prompt_ids(opening, layout(snapshot, self.time_stamps and time_stamps, cue))

    def lay_out(self, snapshot: MemorySnapshot | None, time_stamps: bool = True, cue: str = "") -> Layout:
        """A prompt up to its question: its opening, then the memory (None: no video) and a cue for its newest frame."""
        if snapshot is None:
            ids, features = self.tokenize(self.template.first_question.partition("{}")[0]), None
        else:
            ids, features = self.prefix_ids(snapshot, time_stamps, cue), snapshot.tokens()
        return Layout(ids, features, self.slot_of_token(ids, snapshot))

    def lay_out_recalled(
        self, recalled: Slots, first_slot: int, time_stamps: bool = True, cues: Sequence[str] = ()
    ) -> Layout:
        """Frames of the long-term memory as lines of a prompt: time, visual tokens and cue of each."""
        ids: list[int] = []
        slots: list[int] = []
        size = recalled.features.shape[1]
        for number, seconds in enumerate(recalled.exemplar.tolist()):
            begin = self.tokenize(stamp(seconds), first=False) if self.time_stamps and time_stamps else []
            end = self.tokenize((cues[number] if cues else "") + "\n", first=False)
            ids += [*begin, *[self.video_token_id] * size, *end]
            slots += [*[-1] * len(begin), *[first_slot + number] * size, *[-1] * len(end)]
        return Layout(ids, recalled.features.flatten(0, 1), torch.tensor(slots))

    def slot_of_token(self, ids: Sequence[int], snapshot: MemorySnapshot | None) -> Tensor:
        """The slot ``[L]`` of each of a prefix's ``ids``, counted over all parts in reading order; -1 for text."""
        shown = torch.tensor(ids) == self.video_token_id
        slots = torch.full((len(ids),), -1)
        if snapshot is not None:
            sizes = [torch.full((len(part),), part.features.shape[1]) for _, part in snapshot.parts()]
            counts = torch.cat(sizes)
            slots[shown] = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return slots

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """Text of generated ids, without special tokens or placeholders of visual tokens."""
        ids = [i for i in (ids.tolist() if isinstance(ids, Tensor) else ids) if i >= 0]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, **kwargs)
        return text.strip()


def pad_rows(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of rows of ids, padded on ``side``."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}
