"""From text, memories and frames to what the model takes in, and back to text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.prompts import TEMPLATES, VIDEO, PromptTemplate, layout


class FlashVStreamProcessor(ProcessorMixin):
    """Tokenizer, frame processor and prompt layout of a Flash-VStream model.

    >>> batch = processor("What is happening?", memory=memory.read())
    >>> answer = processor.decode(model.generate(**batch)[0, batch["input_ids"].shape[1] :])
    """

    def __init__(
        self,
        image_processor: FrameProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_template: str = "vicuna_v1",
        video_token_id: int = -200,
        time_stamps: bool = False,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        if prompt_template not in TEMPLATES:
            raise ValueError(f"unknown prompt template {prompt_template!r}; choose from {', '.join(TEMPLATES)}")
        self.prompt_template = prompt_template
        self.video_token_id = video_token_id
        self.time_stamps = time_stamps

    @property
    def template(self) -> PromptTemplate:
        """The prompt template that the model was trained with."""
        return TEMPLATES[self.prompt_template]

    def tokenize(self, text: str, first: bool = True) -> list[int]:
        """Token ids of a piece of a prompt; a beginning-of-sequence token only where ``first``."""
        ids = self.tokenizer(text).input_ids
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("").input_ids
        if not first and added and ids[: len(added)] == added and added[0] == bos:
            ids = ids[len(added) :]
        return ids

    def prompt_ids(self, text: str, pieces: Sequence[str | int] = ()) -> list[int]:
        """Token ids of a rendered prompt, the mark of the video replaced by ``layout``'s pieces.

        Text before and after the mark is tokenized apart, as the released code does
        (``tokenizer_image_token``). Raises ``ValueError`` unless the mark stands as often as there
        are videos.
        """
        before, *after = text.split(VIDEO)
        if len(after) != bool(pieces):
            raise ValueError(f"the prompt names {len(after)} videos, and {int(bool(pieces))} are given")
        ids = self.tokenize(before)
        for piece in pieces:
            ids += [self.video_token_id] * piece if isinstance(piece, int) else self.tokenize(piece, first=False)
        return ids + [i for part in after for i in self.tokenize(part, first=False)]

    def plain(self, text: str) -> str:
        """What somebody typed, without anything that the model would take for a control token."""
        for token in (VIDEO, *self.tokenizer.all_special_tokens):
            text = text.replace(token, "")
        return text

    def prefix_ids(self, snapshot: MemorySnapshot, time_stamps: bool = True) -> list[int]:
        """Ids of a prompt up to its question: the part that can be read before anybody asks.

        ``time_stamps=False`` leaves out the times of a model that was trained with them.
        """
        opening = self.template.first_question.partition("{}")[0] + VIDEO + self.template.video
        return self.prompt_ids(opening, layout(snapshot, self.time_stamps and time_stamps))

    def slot_of_token(self, ids: Sequence[int], snapshot: MemorySnapshot | None) -> Tensor:
        """Which slot each of a prefix's ``ids`` shows ``[L]``, counted over all parts in reading order; -1 for text."""
        shown = torch.tensor(ids) == self.video_token_id
        slots = torch.full((len(ids),), -1)
        if snapshot is not None:
            sizes = [torch.full((len(part),), part.features.shape[1]) for _, part in snapshot.parts()]
            counts = torch.cat(sizes)
            slots[shown] = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return slots

    def question_ids(self, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids that follow ``prefix_ids`` when ``question`` is asked after earlier turns."""
        turns = [*((self.plain(q), self.plain(a)) for q, a in history), (self.plain(question), None)]
        rendered = self.template.render(turns, with_video=False)
        opening = self.template.first_question.partition("{}")[0]
        return self.tokenize(rendered[len(opening) :], first=False)

    def __call__(
        self,
        text: str | Sequence[str],
        memory: MemorySnapshot | Sequence[MemorySnapshot | None] | None = None,
        padding_side: str = "left",
        **_: Any,
    ) -> BatchFeature:
        """A padded batch for ``generate`` or ``forward`` from questions and what they are asked of.

        Gives ``input_ids`` and ``attention_mask`` ``[B, L]`` and ``memory_features``, a list of
        visual tokens ``[n, D]``. A question without a memory is plain chat.
        """
        questions = [text] if isinstance(text, str) else list(text)
        snapshots = [memory] * len(questions) if memory is None or isinstance(memory, MemorySnapshot) else list(memory)
        rows, features = [], []
        for question, snapshot in zip(questions, snapshots, strict=True):
            rendered = self.template.render([(self.plain(question), None)], with_video=snapshot is not None)
            rows.append(self.prompt_ids(rendered, layout(snapshot, self.time_stamps) if snapshot is not None else ()))
            if snapshot is not None:
                features.append(snapshot.tokens())
        batch = pad_rows(rows, self.tokenizer.pad_token_id or 0, padding_side)
        return BatchFeature({**batch, "memory_features": features})

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """Text of generated ids, without special tokens or the visual tokens' places."""
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
