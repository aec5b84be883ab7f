"""The local engine's workers, to be called from another machine; any cluster can place them, and none is known here.

A ``FrameHost`` watches a group of streams, a ``QuestionHost`` answers questions and works on watches. Whatever they
return is a value: nothing on their machine has to outlive them. What must live on is in the state folder.
"""

import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flash_vstream.errors import UserError
from flash_vstream.live.messages import Report, Watch
from flash_vstream.live.question_client import Event, QuestionClient
from flash_vstream.live.question_worker import WARM_SECONDS
from flash_vstream.live.shared_tensors import Layout, RawTensor, SharedTensors, layout_of
from flash_vstream.live.streams import LiveStreams, StreamStatus, WorkerHealth
from flash_vstream.models.choice import ModelChoice
from flash_vstream.video import Frame
from flash_vstream.video.shared_memory import OwnedFolder, shared_folder
from flash_vstream.video.sources import Source

READ_SECONDS = 5.0
"""How long to wait for a host's answer before it counts as away."""
REFRESH_SECONDS = 0.25
"""How often the copies are renewed of streams that are read ahead or have watches."""
log = logging.getLogger("flash_vstream.live")

Stamp = tuple[str, int]
"""Which state this is: the host's id, which is another after a restart, and the state's version there."""


class HostAwayError(UserError):
    """The host does not answer: it died, and another is being started, or the network is down."""


class HostDiedError(HostAwayError):
    """The host's process or machine is gone for certain, so that nobody has to wait for it."""


class RemoteHost(Protocol):
    """A host somewhere; it can be sent to another host."""

    def call(self, method: str, *arguments: Any, seconds: float = READ_SECONDS) -> Any:
        """The value of the host's method; raises what that raises, or ``HostAwayError``."""
        ...


@dataclass(frozen=True)
class Order:
    """A stream to watch. ``path`` names it and its state, here and on every host, and no other stream ever.

    ``saved`` is the content of the file that an earlier host's state was saved to. ``files`` are the source's own
    files by name, where it can only be read on the caller's machine; a single one is the source itself.
    """

    path: str
    source: Source
    saved: bytes | None = None
    files: dict[str, bytes] | None = None


@dataclass(frozen=True)
class Published:
    """A state as it was published; ``now`` is the host's monotonic clock, which means nothing elsewhere."""

    stamp: Stamp
    tensors: dict[str, RawTensor]
    notes: dict[str, Any]
    now: float

    def local_notes(self) -> dict[str, Any]:
        """The notes, with their time by this machine's monotonic clock."""
        if self.notes.get("monotonic") is None:
            return self.notes
        return {**self.notes, "monotonic": time.monotonic() - (self.now - self.notes["monotonic"])}


@dataclass(frozen=True)
class Description:
    """What every host of one model has in common: the frames' side in pixels, and the states' layout."""

    size: int
    layout: Layout
    capacity: dict[str, Any]


@dataclass(frozen=True)
class Pulse:
    """A host's sign of life: its id, its worker, and the status of every stream by its path."""

    id: str
    worker: WorkerHealth
    statuses: dict[str, StreamStatus]


class FrameHost:
    """Watches a group of streams where it runs. Any thread may call any method."""

    def __init__(self, model: ModelChoice):
        self.id = secrets.token_hex(8)
        self._live = LiveStreams(model)
        self._folder = OwnedFolder("flash-vstream-carried")
        self._lock = threading.Lock()
        self._pushed: dict[str, int] = {}  # by path, the number of the newest frame

    def describe(self) -> Description:
        """What every host of this model has in common."""
        info = self._live.worker.info
        return Description(info["size"], info["layout"], self._live.capacity)

    def pulse(self) -> Pulse:
        """A sign of life."""
        statuses = {path: self._live.status(path) for path in self._live.names()}
        return Pulse(self.id, replace(self._live.workers()["frame"], pid=os.getpid()), statuses)

    def add(self, order: Order) -> None:
        """Start watching a stream, or do nothing if it is being watched; raises ``UserError`` if there is no room."""
        with self._lock:
            if order.path in self._live.names():
                return
            folder = self._own_folder(order.path)
            folder.mkdir()
            source, saved = order.source, None
            try:
                if order.saved is not None:
                    saved = folder / "saved.safetensors"
                    saved.write_bytes(order.saved)
                if order.files is not None:
                    source = replace(source, name=str(_unpacked(order.files, folder / "source")))
                self._live.add(order.path, source, saved)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def remove(self, path: str) -> None:
        """Stop watching a stream; do nothing if there is none."""
        with self._lock:
            if path in self._live.names():
                self._live.remove(path)
                self._pushed.pop(path, None)
                shutil.rmtree(self._own_folder(path), ignore_errors=True)

    def _own_folder(self, path: str) -> Path:
        return Path(self._folder.path) / path

    def read(self, path: str, names: Collection[str] | None = None, known: Stamp | None = None) -> Published | None:
        """A stream's newest state, or the tensors in ``names`` of it; None unless there is another than ``known``."""
        shared = self._live.shared_state(path)
        stamp = self.id, shared.version
        if stamp == known or (published := shared.read_raw(names)) is None:
            return None
        return Published(stamp, *published, time.monotonic())

    def read_status(self, path: str) -> dict[str, Any] | None:
        """A stream's status as it was published; None before the first."""
        return self._live.shared_state(path).read_status()

    def push(self, path: str, frame: Frame) -> int:
        """Give a pushed stream its next frame, which was taken just now; returns the frame's number."""
        sink = self._live.sink(path)
        if sink is None:
            raise UserError(f"stream {path!r} has a source of its own")
        with self._lock:
            number = self._pushed[path] = max(sink.taken, self._pushed.get(path, 0)) + 1
            sink.write(number, replace(frame, time=time.monotonic()))
        return number

    def close(self) -> None:
        """Stop watching."""
        self._live.close()
        self._folder.cleanup()


def _unpacked(files: dict[str, bytes], place: Path) -> Path:
    """Write a source's files: one becomes ``place`` itself, several a folder there."""
    if len(files) == 1 and (data := files.get("")) is not None:
        place.write_bytes(data)
        return place
    place.mkdir()
    for name, data in files.items():
        (place / os.path.basename(name)).write_bytes(data)
    return place


@dataclass(frozen=True)
class About:
    """A stream that a question or a watch is about, and the host to read it from."""

    path: str
    host: RemoteHost


class Mirror:
    """Copies of streams' states as shared states of this machine, where question workers can read them."""

    def __init__(self) -> None:
        self._folder = OwnedFolder("flash-vstream-mirror", shared_folder())
        self._copies: dict[str, tuple[SharedTensors, Stamp]] = {}
        self._lock = threading.Lock()

    def path(self, about: About) -> str:
        """Where the copy of a stream's state is, or will be."""
        return os.path.join(self._folder.path, about.path)

    def refresh(self, about: About) -> None:
        """Bring a copy up to date. Raises ``UserError`` if there is no copy and none can be made.

        A copy whose stream's host is away stays as it is: that is what the stream remembers.
        """
        copy = self._copies.get(about.path)
        try:
            published = about.host.call("read", about.path, None, copy[1] if copy is not None else None)
        except UserError:  # also of a host that has just come back, without its streams
            if copy is None:
                raise
            return
        if published is not None:
            self._take(about, published)
        elif copy is None:
            raise UserError("the stream has not shown a frame yet; ask again in a moment")

    def _take(self, about: About, published: Published) -> None:
        with self._lock:
            copy = self._copies.get(about.path)
            if copy is not None and copy[1][0] == published.stamp[0] and copy[1][1] >= published.stamp[1]:
                return  # another thread was quicker
            tensors = {name: value.tensor() for name, value in published.tensors.items()}
            shared = copy[0] if copy is not None else SharedTensors.create(self.path(about), layout_of(tensors))
            shared.publish(tensors, published.local_notes())
            self._copies[about.path] = shared, published.stamp

    def keep(self, paths: Collection[str]) -> None:
        """Remove all other copies."""
        with self._lock:
            for path in self._copies.keys() - set(paths):
                shared, _ = self._copies.pop(path)
                os.unlink(shared.path)

    def close(self) -> None:
        """Remove every copy."""
        self._folder.cleanup()


class QuestionHost:
    """Answers questions, and works on watches, about streams that are watched on other machines."""

    def __init__(self, model: ModelChoice):
        self.id = secrets.token_hex(8)
        self._client = QuestionClient(model)
        self._client.on_report = lambda report: self._reports.put(report)
        self._mirror = Mirror()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._asked: dict[str, tuple[About, float]] = {}  # by path, with when (monotonic seconds) it was last asked
        self._watched: dict[str, About] = {}  # by watch
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        threading.Thread(target=self._refresh_often, name="mirror", daemon=True).start()

    def pulse(self) -> Pulse:
        """A sign of life."""
        return Pulse(self.id, replace(self._client.workers()["question"], pid=os.getpid()), {})

    def ask(
        self,
        about: About | None,
        question: str,
        history: Sequence[tuple[str, str]],
        max_new_tokens: int,
        stop: Sequence[str],
    ) -> Iterator[Event]:
        """See ``Questions.ask``; ``about`` is the stream, None for plain chat."""
        path = None
        if about is not None:
            with self._lock:  # first, so that its copy is not released
                self._asked[about.path] = about, time.monotonic()
            try:
                self._mirror.refresh(about)
            except UserError as error:
                yield Event("error", str(error))
                return
            path = self._mirror.path(about)
        yield from self._client.ask(path, question, history, max_new_tokens, stop)

    def set_watch(self, watch: Watch, about: About) -> None:
        """Add a watch of a stream, or replace the one with its id."""
        with self._lock:
            self._watched[watch.id] = about
        self._client.set_watch(replace(watch, shared_path=self._mirror.path(about)))

    def drop_watch(self, watch: str) -> None:
        """Forget a watch."""
        with self._lock:
            self._watched.pop(watch, None)
        self._client.drop_watch(watch)

    def reports(self, seconds: float) -> tuple[str, list[Report]]:
        """The host's id, and the reports of its watches, after waiting up to ``seconds`` for the first."""
        reports = []
        try:
            reports.append(self._reports.get(timeout=seconds))
            while True:
                reports.append(self._reports.get_nowait())
        except queue.Empty:
            return self.id, reports

    def _refresh_often(self) -> None:
        """Renew the copies that watches look at, and the one that is read ahead; release those no longer in use."""
        while not self._stopping.wait(REFRESH_SECONDS):
            for about in self._needed():
                try:
                    self._mirror.refresh(about)
                except HostAwayError:
                    pass  # its successor has the stream in a moment
                except Exception as error:  # such as a stream that was removed; whoever asks next is told
                    log.debug("the state of %r cannot be copied: %s", about.path, error)
                    with self._lock:
                        self._asked.pop(about.path, None)

    def _needed(self) -> list[About]:
        """The streams whose copies are to be renewed: those with watches, and the one that was asked about last."""
        with self._lock:
            now = time.monotonic()
            for path, (_, asked_at) in list(self._asked.items()):
                if now - asked_at > WARM_SECONDS:
                    del self._asked[path]
            needed = {about.path: about for about in self._watched.values()}
            self._mirror.keep({*self._asked, *needed})
            if self._asked:
                about, _ = max(self._asked.values(), key=lambda entry: entry[1])
                needed[about.path] = about
        return list(needed.values())

    def close(self) -> None:
        """Stop answering."""
        self._stopping.set()
        self._client.close()
        self._mirror.close()
