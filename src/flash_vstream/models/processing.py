"""Turns text, memories and frames into model inputs, and generated ids back into text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, StarConfig
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.interface import VIDEO_TOKEN
from flash_vstream.models.pictures import per_prompt, pictures_snapshot, read_messages
from flash_vstream.models.prompt_layout import PromptLayout, pad_rows
from flash_vstream.models.prompts import TEMPLATES, layout


class FlashVStreamProcessor(PromptLayout, ProcessorMixin):
    """Tokenizer, frame processor and prompt layout of a Flash-VStream model.

    ``memory_config`` has the sizes of the model's memory, which pictures in a prompt need.

    >>> batch = processor("What is happening?", memory=memory.read())
    >>> answer = processor.decode(model.generate(**batch)[0, batch["input_ids"].shape[1] :])
    """

    def __init__(
        self,
        image_processor: FrameProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_template: str = "vicuna_v1",
        video_token_id: int = VIDEO_TOKEN,
        time_stamps: bool = False,
        chat_template: str | None = None,
        memory_config: dict[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        if prompt_template not in TEMPLATES:
            raise ValueError(f"unknown prompt template {prompt_template!r}; choose from {', '.join(TEMPLATES)}")
        self.prompt_template = prompt_template
        self.video_token_id = video_token_id
        self.time_stamps = time_stamps
        self.memory_config = memory_config

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> list[Any]:
        """The frame processor and the tokenizer of a folder, without Transformers' Auto class for the first.

        Some versions have ``AutoImageProcessor`` only where torchvision is installed, which nothing here needs.
        """
        parts = (FrameProcessor, AutoTokenizer)
        return [part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        memory: MemorySnapshot | Sequence[MemorySnapshot | None] | None = None,
        padding_side: str = "left",
        images: Any = None,
        videos: Any = None,
        **_: Any,
    ) -> BatchFeature:
        """A padded batch for ``generate`` or ``forward``, from questions and what they are about.

        That is a memory, or pictures: ``images`` is a picture or a list of them, for several questions a list of
        either. Returns ``input_ids`` and ``attention_mask`` ``[B, L]``, and ``memory_features``, a list of
        visual tokens ``[n, D]``, or ``pixel_values`` and ``picture_counts``. A question about nothing is plain chat.
        Raises ``UserError`` for ``videos``, which are watched instead.
        """
        if videos is not None:
            raise UserError("a processor cannot watch videos; use FlashVStream.watch, and ask about the stream")
        questions = [text] if isinstance(text, str) else list(text or [""])
        if images is not None:
            groups = per_prompt(images, len(questions))
            prompts = [(question, (), group) for question, group in zip(questions, groups, strict=True)]
            return self._picture_batch(prompts, padding_side)
        snapshots = [memory] * len(questions) if memory is None or isinstance(memory, MemorySnapshot) else list(memory)
        rows = [self._row(*pair) for pair in zip(questions, snapshots, strict=True)]
        features = [snapshot.tokens() for snapshot in snapshots if snapshot is not None]
        batch = pad_rows(rows, self.tokenizer.pad_token_id or 0, padding_side)
        return BatchFeature({**batch, "memory_features": features})

    def _row(
        self, question: str, snapshot: MemorySnapshot | None, history: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """The ids of one prompt."""
        opening, parts = self.template.first_question.partition("{}")[0], self._question_parts(question, history)
        if snapshot is None:
            return self.tokenize([opening, *parts])
        ids = self._around(opening, layout(snapshot, self.time_stamps))
        return ids + self.tokenize([self.template.video, *parts], first=False)

    def _picture_batch(
        self, prompts: Sequence[tuple[str, Sequence[tuple[str, str]], Sequence[Any]]], padding_side: str = "left"
    ) -> BatchFeature:
        """A batch from questions with their earlier turns and their pictures."""
        if self.memory_config is None and any(pictures for _, _, pictures in prompts):
            raise UserError("this processor was saved without the sizes of its model's memory; load it with hub.load")
        star = StarConfig.from_dict(self.memory_config or {})
        shown = [picture for _, _, pictures in prompts for picture in pictures]
        rows = [
            self._row(question, pictures_snapshot(star, len(pictures)) if pictures else None, history)
            for question, history, pictures in prompts
        ]
        batch: dict[str, Any] = pad_rows(rows, self.tokenizer.pad_token_id or 0, padding_side)
        if shown:
            batch |= self.image_processor(shown)
            batch["picture_counts"] = torch.tensor([len(pictures) for _, _, pictures in prompts])
        return BatchFeature(batch)

    # Every option that is not named here is refused or without effect.
    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: Any = None, **kwargs: Any
    ) -> Any:
        """A chat, or several, with pictures in its first message, as a text or (``tokenize=True``) as a batch.

        The template is the model's own; it cannot be replaced. Raises ``UserError`` for what it cannot express.
        """
        if chat_template is not None or kwargs.get("continue_final_message"):
            raise UserError("neither another chat_template nor continue_final_message is supported")
        chats = [conversation] if isinstance(conversation[0], Mapping) else list(conversation)
        read = [read_messages(chat) for chat in chats]
        if kwargs.get("tokenize"):
            return self._picture_batch([(question, history, pictures) for question, history, pictures in read])
        texts = [
            self.template.render([*history, (question, None)], with_video=bool(pictures))
            for question, history, pictures in read
        ]
        return texts[0] if chats[0] is conversation else texts

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated rows, always without special tokens, for Transformers' pipelines."""
        return [self.decode(row) for row in generated_outputs]
