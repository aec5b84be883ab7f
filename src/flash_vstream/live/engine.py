"""What a server needs of an engine: streams that are watched, and questions that are answered.

The local engine (``local_engine``) is two worker processes of this machine around shared memory. ``ray_engine`` places
many of each on the machines of a Ray cluster. ``serve/`` knows these two protocols and neither engine.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flash_vstream.live.messages import Report, Watch
from flash_vstream.live.published import PublishedState
from flash_vstream.live.question_client import Event, QuestionClient
from flash_vstream.live.streams import LiveStreams, StreamStatus, WorkerHealth
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS
from flash_vstream.video import Frame
from flash_vstream.video.sources import Source


class FrameSink(Protocol):
    """Takes frames for a pushed stream: ``number`` counts from 1, ``taken`` is that of the newest that was watched."""

    @property
    def taken(self) -> int: ...
    def write(self, number: int, frame: Frame) -> None: ...


class Streams(Protocol):
    """Streams that are watched. One stream's failure never reaches another; a dead worker is replaced."""

    @property
    def capacity(self) -> Mapping[str, Any]:
        """A memory's size, see ``memory_capacity``."""
        ...

    def workers(self) -> Mapping[str, WorkerHealth]:
        """The frame workers by name."""
        ...

    def add(self, name: str, source: Source, saved: Path | None = None, carry: bool = False) -> None:
        """Start watching ``source`` as ``name``, resuming from ``saved`` (written by ``save_state``) if it exists.

        With ``carry`` the source is a file or folder that only this process can read, and the engine brings it along.
        Raises ``UserError`` if the name is taken or there is no room; nothing of the stream remains then.
        """
        ...

    def remove(self, name: str) -> None:
        """Stop watching ``name``. This and what follows raise ``UserError`` if there is no such stream."""
        ...

    def names(self) -> Sequence[str]:
        """The names of the watched streams."""
        ...

    def source(self, name: str) -> Source:
        """What the stream watches, the same object for as long as it does."""
        ...

    def shared_state(self, name: str) -> PublishedState:
        """What is published of the stream; its ``path`` is what questions and watches name it by."""
        ...

    def sink(self, name: str) -> FrameSink | None:
        """Where the frames of a pushed stream go; None for other streams."""
        ...

    def status(self, name: str) -> StreamStatus:
        """The stream's status."""
        ...

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        ...


class Questions(Protocol):
    """Questions and watches about published states."""

    on_report: Callable[[Report], None]
    """Called with each report of a watch, in a thread of the engine's own."""

    def workers(self) -> Mapping[str, WorkerHealth]:
        """The question workers by name."""
        ...

    def ask(
        self,
        shared_path: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Generator[Event, None, None]:
        """Yield an answer's events as they arrive; the last is done or error. Closing the generator cancels.

        The question is about the state with that ``path``; None means plain chat. Any thread may ask.
        """
        ...

    def set_watch(self, watch: Watch) -> None:
        """Add a watch, or replace the one with its id."""
        ...

    def drop_watch(self, watch: str) -> None:
        """Forget a watch; do nothing if there is none with this id."""
        ...

    def close(self) -> None:
        """End every question and watch. Safe to call twice."""
        ...


@dataclass(frozen=True)
class Engine:
    """A running engine."""

    streams: Streams
    questions: Questions


StartEngine = Callable[[ModelChoice], Engine]
"""Starts an engine for a model; raises ``UserError`` if it cannot, and then leaves nothing running."""


def local_engine(model: ModelChoice) -> Engine:
    """One frame worker and one question worker, started in parallel; if one fails, neither is left running."""
    with ThreadPoolExecutor(2) as pool:
        streams, questions = pool.submit(LiveStreams, model), pool.submit(QuestionClient, model)
    if (error := streams.exception() or questions.exception()) is not None:
        for started in (streams, questions):
            if started.exception() is None:
                started.result().close()
        raise error
    return Engine(streams.result(), questions.result())
