"""Prompts of Transformers' vision-language models: their own chat templates around a memory."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.interface import VIDEO_TOKEN, Layout
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.models.prompts import LONGEST_STAMP_SECONDS, PromptTemplate
from flash_vstream.models.vlm_families import Family, Piece

_QUESTION, _ANSWER, _NEXT = "QUESTIONONE", "ANSWERONE", "QUESTIONTWO"
EARLIER = "Earlier:\n"
"""What stands before the frames that a question recalls."""


class VlmProcessor(FlashVStreamProcessor):
    """Text and frames of a Transformers model, in the model's own chat template (a ``StreamProcessor``).

    ``chat_template`` is the text of the processor's template, where the tokenizer has none. Raises ``UserError`` for a
    model without a template: it cannot answer questions.
    """

    def __init__(
        self,
        image_processor: FrameProcessor,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.family = family
        self._stop_ids = stop_ids

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refused: this processor lays out memories, and the model's own in Transformers makes batches."""
        raise UserError("batches of this model are made by its own processor in Transformers (AutoProcessor)")

    @cached_property
    def template(self) -> PromptTemplate:
        """The model's chat template, taken apart into a ``PromptTemplate``."""
        template = self.chat_template or self.tokenizer.chat_template
        if not template:
            raise UserError(f"this {self.family.title} model has no chat template; use the instruction-tuned one")
        once = self._rendered([_QUESTION])
        opening, _, closing = once.partition(_QUESTION)
        twice = self._rendered([_QUESTION, _ANSWER, _NEXT])
        between = twice.partition(_ANSWER)[2].partition(_NEXT)[0]
        bos = self.tokenizer.bos_token
        if bos and opening.startswith(bos) and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            opening = opening.removeprefix(bos)  # the tokenizer puts one there
        return PromptTemplate(
            name=self.family.title,
            first_question=f"{opening}{{}}{closing}",
            question=f"{{}}{closing}",
            answer=f"{{}}{between}",
            video="\n",
            stop=str(self.tokenizer.eos_token),
        )

    def _rendered(self, turns: Sequence[str]) -> str:
        """The template's text of alternating questions and answers, open for another answer."""
        roles = ("user", "assistant")
        for whole in (False, True):  # most templates take a list of contents, some just text
            messages = [
                {"role": roles[i % 2], "content": text if whole else [{"type": "text", "text": text}]}
                for i, text in enumerate(turns)
            ]
            try:
                text: Any = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # whatever the template's author raises
                reason = error
                continue
            reason = ValueError("it leaves out what is said")
            if all(text.count(turn) == 1 for turn in turns):
                return str(text)
        raise UserError(f"the chat template of this {self.family.title} model cannot be used ({reason})")

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: those of the model's generation settings, and the tokenizer's."""
        return frozenset({*self._stop_ids, self.tokenizer.eos_token_id} - {None})

    def lay_out(self, snapshot: MemorySnapshot | None, time_stamps: bool = True, cue: str = "") -> Layout:
        """The prompt up to its question. Slots of one part follow one another in time, the newest frames last."""
        opening, *_ = self.template.first_question.partition("{}")
        ids = self.tokenize(opening)
        if snapshot is None:
            return Layout(ids, None, torch.full((len(ids),), -1))
        slots = [part for _, part in snapshot.parts()]
        self._check_size(slots)
        shown = self._laid_out(slots, time_stamps, first_slot=0)
        after = self.tokenize(self.template.video, first=False)
        all_ids = [*ids, *shown.ids, *after]
        outside = [torch.full((len(some),), -1) for some in (ids, after)]
        return Layout(all_ids, shown.features, torch.cat([outside[0], shown.slot_of_token, outside[1]]))

    def _check_size(self, parts: Sequence[Slots]) -> None:
        """Raise ``UserError`` for more visual tokens than the model has positions."""
        tokens = sum(len(part) * part.features.shape[1] for part in parts)
        most = int(self.family.config.get_text_config().max_position_embeddings)
        if tokens >= most:
            raise UserError(f"the memory has {tokens:,} visual tokens; the model reads {most:,} at most, so keep fewer")

    def lay_out_recalled(
        self, recalled: Slots, first_slot: int, time_stamps: bool = True, cues: Sequence[str] = ()
    ) -> Layout:
        """Frames of the long-term memory as a piece of a prompt, in time order; slots count from ``first_slot``."""
        shown = self._laid_out([recalled], time_stamps, first_slot)
        opening = self.tokenize(EARLIER, first=False)
        slots = torch.cat([torch.full((len(opening),), -1), shown.slot_of_token])
        return Layout([*opening, *shown.ids], shown.features, slots)

    def _laid_out(self, parts: Sequence[Slots], time_stamps: bool, first_slot: int) -> Layout:
        ids: list[int] = []
        slots: list[int] = []
        number = first_slot
        for part in parts:
            for seconds in part.exemplar.tolist():
                pieces = self._frame(part.features.shape[1], seconds if time_stamps else None, number - first_slot + 1)
                for piece in pieces:
                    own = self._piece_ids(piece)
                    ids += own
                    slots += [number if i == VIDEO_TOKEN else -1 for i in own]
                number += 1
        return Layout(ids, torch.cat([part.features.flatten(0, 1) for part in parts]), torch.tensor(slots).long())

    def _frame(self, tokens: int, seconds: float | None, number: int) -> list[Piece]:
        return self.family.frame(tokens, "" if seconds is None else self.family.time(seconds), number)

    def _piece_ids(self, piece: Piece) -> list[int]:
        if isinstance(piece, str):
            return self.tokenize(piece, first=False)
        return [piece] if piece < 0 else [VIDEO_TOKEN] * piece

    def longest_layout(self, config: Any) -> int:
        """The tokens of a prompt up to its question, for a full memory and as many frames as a question recalls."""
        star = config.star
        opening = len(self.tokenize(self.template.first_question.partition("{}")[0]))
        kinds = [
            (star.temporal_length, star.temporal_size),
            (star.retrieved_length + star.spatial_length, star.spatial_size),
            (config.recalled, star.longterm_size),
        ]
        marks = sum(
            len(self._piece_ids(piece))
            for piece in self._frame(0, float(LONGEST_STAMP_SECONDS), 1000)
            if isinstance(piece, str) or piece < 0
        )
        slots: int = sum(length * (side**2 + marks) for length, side in kinds)
        return opening + slots + len(EARLIER)
