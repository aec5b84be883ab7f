"""The limit on a question's length: what a model's context holds besides the memory and the answer.

Needs no PyTorch, so that a server can check questions without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flash_vstream.errors import UserError

if TYPE_CHECKING:
    from flash_vstream.models.interface import ModelConfig, StreamProcessor
    from flash_vstream.models.light_text import LightText

MAX_NEW_TOKENS = 192
"""An answer's length in tokens, unless its caller wants another."""
RESERVED_FOR_NOTES = 64
"""Tokens reserved for the notes that grounding adds to a question."""
MOST_CHARACTERS_A_TOKEN = 32
"""Text with more characters than this per available token is refused without being tokenized."""


class PromptTooLongError(UserError):
    """A question that, with its earlier turns, does not fit the model; ``most`` is the limit in tokens."""

    def __init__(self, message: str, most: int):
        super().__init__(message)
        self.most = most


class PromptLimit:
    """The limit on a question's tokens, earlier turns included.

    It is the context length minus a full memory with its time stamps, the notes of grounding and the answer. So it
    does not depend on how much of a stream has been seen, and checking it needs only the tokenizer.
    """

    def __init__(self, config: "ModelConfig", processor: "StreamProcessor | LightText"):
        self.processor = processor
        self.context = int(config.text_config.max_position_embeddings)
        self.reserved = processor.longest_layout(config) + (RESERVED_FOR_NOTES if config.grounding_config else 0)

    def check(self, question: str, history: Sequence[tuple[str, str]], max_new_tokens: int) -> None:
        """Raise ``PromptTooLongError`` if a question does not fit, ``UserError`` if its text is not valid Unicode."""
        most = max(0, self.context - self.reserved - max_new_tokens)
        characters = len(question) + sum(len(asked) + len(answered) for asked, answered in history)
        if characters > most * MOST_CHARACTERS_A_TOKEN:
            raise self._too_long(f"{characters:,} characters", most, history, max_new_tokens)
        length = len(self.processor.question_ids(question, history))
        if length > most:
            raise self._too_long(f"{length:,} tokens", most, history, max_new_tokens)

    def _too_long(self, length: str, most: int, history: Sequence[object], max_new_tokens: int) -> PromptTooLongError:
        turns = f" with {len(history)} earlier turn{'s' * (len(history) != 1)}" if history else ""
        return PromptTooLongError(
            f"the question is {length} long{turns}; the model takes {most:,} tokens at most (its context of"
            f" {self.context:,}, less the memory and {max_new_tokens:,} for the answer); shorten it",
            most,
        )
