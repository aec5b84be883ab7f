"""Text and ids of a prompt. Needs neither PyTorch nor Transformers."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.models.prompts import LONGEST_STAMP_SECONDS, TEMPLATES, VIDEO, PromptTemplate, stamp


class Typed(str):
    """Text typed by a user, no part of which may become a control token."""


def check_text(text: str) -> None:
    """Raise ``UserError`` if ``text`` is not valid Unicode, that is, if it has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"character {error.start + 1} of the text is half of a surrogate pair ({code})") from None


class PromptText:
    """Turns text into ids.

    ``tokenizer`` is Transformers', or has as much of it as is used here. ``prompt_template`` is a key of ``TEMPLATES``.
    """

    tokenizer: Any
    prompt_template: str
    video_token_id: int
    time_stamps: bool

    @property
    def template(self) -> PromptTemplate:
        """The prompt template that the model was trained with."""
        return TEMPLATES[self.prompt_template]

    def tokenize(self, text: str | Sequence[str], first: bool = True) -> list[int]:
        """Token ids of a piece of a prompt, with a beginning-of-sequence token only if it is ``first``.

        ``text`` may be given in parts, which are tokenized as one text. ``Typed`` parts never yield control
        tokens: if they would, all parts are tokenized separately, the typed ones without control tokens.
        Raises ``UserError`` for typed text that is not valid Unicode.
        """
        parts = [text] if isinstance(text, str) else list(text)
        typed = [part for part in parts if isinstance(part, Typed)]
        check_text("".join(typed))
        ids = self._encode("".join(parts), first)
        if not typed:
            return ids
        apart = [
            (part, self._encode_typed(part) if isinstance(part, Typed) else self._encode(part, first and i == 0))
            for i, part in enumerate(parts)
        ]
        own = [i for part, row in apart if not isinstance(part, Typed) for i in row if i in self._control_ids]
        if [i for i in ids if i in self._control_ids] == own:
            return ids
        return [i for _, row in apart for i in row]

    def _encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("").input_ids
        if not first and added and ids[: len(added)] == added and added[0] == bos:
            ids = ids[len(added) :]
        return ids

    def _encode_typed(self, text: str) -> list[int]:
        """Ids of ``text`` on its own, with every control token spelled out as ordinary text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        unknown = self.tokenizer.unk_token_id
        return [i for i in ids if i == unknown or i not in self._control_ids]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | set(self.tokenizer.all_special_ids))

    def prompt_ids(self, text: str, pieces: Sequence[str | int] = ()) -> list[int]:
        """Token ids of a rendered prompt, with the video's mark replaced by the ``pieces`` from ``layout``.

        Text before and after the mark is tokenized separately, as in the released code
        (``tokenizer_image_token``). Raises ``ValueError`` unless there is one mark if there are pieces,
        and none otherwise.
        """
        before, *after = text.split(VIDEO)
        if len(after) != bool(pieces):
            raise ValueError(f"the prompt names {len(after)} videos, and {int(bool(pieces))} are given")
        return self._around(before, pieces) + [i for part in after for i in self.tokenize(part, first=False)]

    def _around(self, before: str, pieces: Sequence[str | int]) -> list[int]:
        """Ids of a prompt up to the end of its video: the text ``before`` it, then its ``pieces``."""
        ids = self.tokenize(before)
        for piece in pieces:
            ids += [self.video_token_id] * piece if isinstance(piece, int) else self.tokenize(piece, first=False)
        return ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the template's, and the tokenizer's."""
        stop = self.tokenizer.convert_tokens_to_ids(self.template.stop)
        return frozenset({stop, self.tokenizer.eos_token_id} - {None, self.tokenizer.unk_token_id})

    def longest_layout(self, config: Any) -> int:
        """The tokens of ``lay_out`` for a full memory with its time stamps."""
        star, (opening, *_) = config.star, self.template.first_question.partition("{}")
        tokens = len(self.tokenize(opening + self.template.video)) + int(star.max_tokens)
        if config.time_stamps:
            stamped = star.temporal_length + star.retrieved_length + star.spatial_length
            tokens += stamped * len(self.tokenize(f"now {stamp(LONGEST_STAMP_SECONDS)}", first=False))
        return tokens

    def question_ids(self, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids that follow ``prefix_ids`` when ``question`` is asked after the turns in ``history``.

        Raises ``UserError`` for text that is not valid Unicode.
        """
        return self.tokenize(self._question_parts(question, history), first=False)

    def _question_parts(self, question: str, history: Sequence[tuple[str, str]] = ()) -> list[str]:
        """The prompt after its opening, as parts: the template's text and the ``Typed`` text."""
        _, _, closing = self.template.first_question.partition("{}")
        before, parts = "", []
        for asked, answered in history:
            start, _, end = self.template.answer.partition("{}")
            parts += [before, Typed(asked), closing + start, Typed(answered), end]
            before, _, closing = self.template.question.partition("{}")
        return [*parts, before, Typed(question), closing]
