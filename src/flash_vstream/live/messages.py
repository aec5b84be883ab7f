"""What a server and its workers send each other. Needs no PyTorch, so that the server can do without."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS
from flash_vstream.video.sources import Source

WATCHES = 0
"""The number under which reports of watches are sent; questions have numbers from 1."""


@dataclass(frozen=True)
class Add:
    """Watch ``source`` as the stream ``name``, publishing to the shared state at ``shared_path``.

    That file already exists, in a folder that belongs to this stream. ``saved`` is the file that an earlier run's state
    was saved to; it may be missing. ``ring`` is the path of a pushed source's ring.
    """

    name: str
    source: Source
    shared_path: str
    saved: str | None = None
    ring: str | None = None


@dataclass(frozen=True)
class Remove:
    """Stop watching the stream ``name``; the worker replies with its shared path."""

    name: str


@dataclass(frozen=True)
class Ask:
    """A question about the stream whose shared state is at ``shared_path`` (None: plain chat).

    ``asked_at`` is in monotonic seconds; the answer must be complete within ``seconds`` of it.
    """

    id: int
    shared_path: str | None
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    asked_at: float = field(default_factory=time.monotonic)
    seconds: float = 120.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Cancel a question: its caller is gone."""

    id: int


@dataclass(frozen=True)
class DropWatch:
    """Forget a watch."""

    id: str


@dataclass(frozen=True)
class Alert:
    """What is told of an event.

    ``kind`` is start, update or end, or caption for a description; ``began`` and ``time`` are in seconds of stream
    time, ``clock`` in Unix time.
    ``confirmation`` is the careful score at its start, ``sentence`` what the language model says is happening.
    ``evidence`` lists the times of the frames that were read. ``picture`` is a JPEG.
    """

    kind: str
    began: float
    time: float
    clock: float
    confidence: float
    confirmation: float | None = None
    sentence: str = ""
    evidence: tuple[float, ...] = ()
    picture: bytes | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the picture; ``kind`` is the event's ``state`` there."""
        values = {name: value for name, value in asdict(self).items() if name not in ("kind", "picture")}
        return {"state": self.kind, **values}


@dataclass(frozen=True)
class Describe:
    """A request to describe a stream at most once per ``seconds`` of stream time, and only when it has changed."""

    seconds: float


@dataclass(frozen=True)
class Watch:
    """A standing question about the stream at ``shared_path``, and the ``state`` to go on from.

    With ``Describe`` as its rule, it asks about no event but for descriptions.
    """

    id: str
    shared_path: str
    event: str
    rule: WatchRule | Describe
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A watch's state after a look, and what there is to tell."""

    watch: str
    state: dict[str, Any]
    alert: Alert | None = None
