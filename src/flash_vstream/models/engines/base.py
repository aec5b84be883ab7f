"""The interface of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

CHUNK_TOKENS = 512
"""Longer texts are read in chunks of this many tokens, so that attention over them fits into memory."""


@dataclass(frozen=True)
class Feed:
    """At least one token to be read after what ``sequence`` holds, which is of the engine that made it.

    ``ids``, ``features`` and ``positions`` as in ``interface.Layout``. The logits after the last ``keep`` tokens are
    wanted.
    """

    sequence: Any
    ids: Sequence[int]
    features: Tensor | None = None
    positions: Tensor | None = None
    keep: int = 1


@dataclass(frozen=True)
class Row:
    """What comes of a ``Feed``: float32 ``logits [keep, V]``.

    ``attention [T]`` is what the last token read paid to each of the sequence's T tokens, averaged over heads and
    summed over layers; None where the engine cannot tell.
    """

    logits: Tensor
    attention: Tensor | None = None


class Engine(Protocol):
    """Reads tokens into sequences, and tells the logits after them."""

    name: str

    def new_sequence(self) -> Any:
        """An empty sequence."""
        ...

    def fork(self, sequence: Any) -> Any:
        """A sequence that continues from what ``sequence`` holds; reading into either leaves the other as it is."""
        ...

    def step(self, feeds: Sequence[Feed], attention: bool = False) -> list[Row]:
        """Read every feed, each of a sequence of its own, and return their rows.

        Each row is that of its feed alone, up to rounding. Attention is computed only if it is asked for.
        """
        ...
