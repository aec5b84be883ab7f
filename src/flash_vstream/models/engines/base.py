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
    wanted, and the ``attention`` that the last one pays only if it says so. Up to ``ahead`` further tokens will be fed,
    each the likeliest after the one before; an engine may generate them in advance.
    """

    sequence: Any
    ids: Sequence[int]
    features: Tensor | None = None
    positions: Tensor | None = None
    keep: int = 1
    attention: bool = False
    ahead: int = 0


@dataclass(frozen=True)
class Row:
    """What comes of a ``Feed``: float32 ``logits [keep, V]``.

    ``attention [T]`` is what the last token read paid to each of the sequence's T tokens, averaged over heads and
    summed over layers; None if it was not wanted, or the engine cannot tell. ``error`` is why nothing came of this
    feed, where an engine can fail for one alone.
    """

    logits: Tensor
    attention: Tensor | None = None
    error: Exception | None = None

    def checked(self) -> "Row":
        """The row itself; raises its error."""
        if self.error is not None:
            raise self.error
        return self


class Engine(Protocol):
    """Reads tokens into sequences, and tells the logits after them."""

    name: str
    together: bool
    """Whether a step for many sequences costs less than a step for each."""

    def new_sequence(self) -> Any:
        """An empty sequence."""
        ...

    def fork(self, sequence: Any) -> Any:
        """A sequence that continues from what ``sequence`` holds; reading into either leaves the other as it is."""
        ...

    def step(self, feeds: Sequence[Feed]) -> list[Row]:
        """Read every feed, each of a sequence of its own, and return their rows.

        Each row is that of its feed alone, up to rounding.
        """
        ...
