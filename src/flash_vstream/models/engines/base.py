"""The interface of an engine."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

CHUNK_TOKENS = 512
"""Longer inputs are read in chunks of this many tokens, so that attention over them fits into memory."""


class Sequence(Protocol):
    """Tokens that an engine has read, with their keys and values."""

    @property
    def length(self) -> int:
        """How many tokens have been read."""


@dataclass(frozen=True)
class Feed:
    """Embeddings ``[L, width]`` to be read after what ``sequence`` holds; L is at least 1."""

    sequence: Any
    embeddings: Tensor


@dataclass(frozen=True)
class Row:
    """What comes of a ``Feed``: float32 ``logits [V]`` of the token after it.

    ``attention [T]`` is what the last token read paid to each of the sequence's T tokens, summed over layers and
    averaged over heads; None where the engine cannot tell.
    """

    logits: Tensor
    attention: Tensor | None


class Engine(Protocol):
    """Reads embeddings into sequences. Not for use by several threads at once unless it says so."""

    name: str

    def new_sequence(self) -> Any:
        """An empty sequence."""

    def fork(self, sequence: Any) -> Any:
        """A sequence that continues from what ``sequence`` holds; reading into either leaves the other as it is."""

    def step(self, feeds: Seq[Feed], attention: bool = False) -> list[Row]:
        """Read every feed, each of a sequence of its own, and return their rows.

        Row by row the result is that of reading each feed alone, up to rounding. Attention is only computed if asked
        for.
        """
