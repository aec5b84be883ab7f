"""An answer and what it stands on: the memory that was read for it, and the evidence in that memory."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.models.engines import Feed, Row
from flash_vstream.models.grounding import Mention


@dataclass(frozen=True)
class Evidence:
    """A memory slot that was available to an answer.

    ``part`` is abstract, temporal, retrieved, spatial or longterm; ``start``, ``end`` and ``exemplar`` are
    seconds of stream time; ``weight`` is the number of frames merged into the slot. ``share``, from 0
    to 1, is the slot's share of the attention that the answer's tokens paid to the memory (None if the
    attention implementation does not return it). It shows where the model looked, not why it gave the
    answer.
    """

    part: str
    start: float
    end: float
    exemplar: float
    weight: float
    share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prefix:
    """A memory that the language model has already read, ready for any number of questions.

    ``ids`` are the prompt's L tokens up to the question, and ``sequence`` is what the engine keeps of them.
    ``slot_of_token [L]`` is the index of the slot that each token belongs to, counted over all parts
    in reading order, and -1 for text. ``time_stamps`` is False if the slots' times were left out. ``recalled`` are
    frames of the long-term memory that were read after it, for one question; their slots are counted last.
    """

    snapshot: MemorySnapshot | None
    sequence: Any
    ids: list[int]
    slot_of_token: Tensor
    time_stamps: bool = True
    recalled: Slots | None = None

    def parts(self) -> Iterator[tuple[str, Slots]]:
        """Each part's name and slots, in the order in which slots are counted."""
        if self.snapshot is not None:
            yield from self.snapshot.parts()
        if self.recalled is not None:
            yield "longterm", self.recalled


class Answer:
    """An answer that is generated as it is iterated over.

    Iteration yields pieces of text; ``text`` holds the text so far. ``stream_time`` is the time in
    seconds of the newest frame in the snapshot (None without a video). ``mentions`` are the events
    named in the question and where the memory shows them (empty without grounding). ``prefilled``
    says whether the memory was read before the question was asked.

    Set by the end: ``tokens`` generated, ``prompt_tokens``, ``finish_reason`` ("stop", or "length" at
    ``max_new_tokens``), ``evidence``, ``first_token_seconds`` (wall-clock, from the question to the
    first token) and ``tokens_per_second`` after the first (None for a single token).
    """

    def __init__(self, question: str, snapshot: MemorySnapshot | None, prefilled: bool):
        self.question = question
        self.stream_time = snapshot.time if snapshot is not None else None
        self.prefilled = prefilled
        self.text = ""
        self.tokens = 0
        self.prompt_tokens = 0
        self.finish_reason = "stop"
        self.first_token_seconds: float | None = None
        self.tokens_per_second: float | None = None
        self.evidence: list[Evidence] = []
        self.mentions: list[Mention] = []
        self._pieces: Iterator[str] = iter(())
        self._work: Generator[Feed | str, Row | None, None] = _nothing()
        self._feed: Feed | None = None
        self._said: list[str] = []
        """Pieces of text that came before anything was to be read."""

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def finish(self) -> "Answer":
        """Generate the rest of the text, and return the answer itself."""
        for _ in self._pieces:
            pass
        return self

    @property
    def work(self) -> Generator[Feed | str, Row | None, None]:
        """What generates it: yields what is to be read, which is answered by its row, and pieces of text.

        For an answer that is a part of another; iterate over the answer otherwise.
        """
        return self._work

    def to_dict(self) -> dict[str, Any]:
        """All public fields as plain values for JSON."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return public | {name: [item.to_dict() for item in public[name]] for name in ("evidence", "mentions")}


def _nothing() -> Generator[Feed | str, Row | None, None]:
    yield from ()


def cut(text: str, stop: Sequence[str], whole: bool) -> tuple[str, bool]:
    """``text`` up to the first of the ``stop`` strings, and whether it contains one.

    Unless the text is ``whole``, a suffix that could be the beginning of a stop string is held back.
    """
    positions = [at for ending in stop if (at := text.find(ending)) >= 0]
    if positions:
        return text[: min(positions)], True
    held = [n for ending in stop for n in range(1, len(ending)) if text.endswith(ending[:n])]
    return (text if whole or not held else text[: len(text) - max(held)]), False
