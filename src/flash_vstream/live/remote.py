"""Streams and questions of hosts on other machines, as a server sees them (``engine``); the cluster is not known here.

A stream belongs to one host. When that dies, a spare one takes its place if there is one, otherwise the one that the
cluster starts again. It is given the stream with its last snapshot from the state folder; until then the stream's
status says so, and the snapshot is what can be read of it.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.hosts import (
    READ_SECONDS,
    About,
    Description,
    HostAwayError,
    HostDiedError,
    Order,
    Published,
    Pulse,
    RemoteHost,
)
from flash_vstream.live.messages import Report, Watch
from flash_vstream.live.question_client import DIED, HANG_SECONDS, QUESTION_SECONDS, Event
from flash_vstream.live.shared_tensors import RawTensor
from flash_vstream.live.stream_state import load_state
from flash_vstream.live.streams import StreamStatus, WorkerHealth
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS
from flash_vstream.video import Frame
from flash_vstream.video.sources import Source

POLL_SECONDS = 0.25
"""How often each host is asked for its streams' statuses."""
SILENT_SECONDS = 10.0
"""How long a host may be silent before a spare one takes its place; one that is known to be dead is not waited for."""
ADD_SECONDS = 60.0
"""How long a host may take to accept a stream with its snapshot."""
REFUSED_SECONDS = 10.0
"""How long to wait before a host is given a stream again that it refused."""
REPORTS_SECONDS = 1.0
"""How long a call for the reports of watches waits for the first; a new watch waits for the call."""
AWAY = "its frame worker is away; the stream goes on from its last snapshot as soon as another is there"
BUSY = Event("error", "no question worker answered in time; ask again in a moment")
log = logging.getLogger("flash_vstream.live")

AskHost = Callable[[About | None, str, tuple[tuple[str, str], ...], int, tuple[str, ...]], Generator[Event, None, None]]
"""``QuestionHost.ask`` of some host; closing the generator cancels. Raises ``HostAwayError``."""


@dataclass(eq=False)
class _Host:
    """A host, what it last said of itself (None while it is away), and the streams that belong to it by path."""

    remote: RemoteHost
    name: str
    streams: "dict[str, _Stream]" = field(default_factory=dict)
    pulse: Pulse | None = None
    heard: float = 0.0
    id: str | None = None
    restarts: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)  # held while streams are given or taken

    @property
    def health(self) -> WorkerHealth:
        """The worker's health; both the host's restarts and those of its own worker count."""
        if (pulse := self.pulse) is None:
            return WorkerHealth(False, None, self.restarts)
        return replace(pulse.worker, restarts=self.restarts + pulse.worker.restarts)


@dataclass(eq=False)
class _Stream:
    """A stream: its host, its snapshot's file (which may not exist yet), and the newest that is known of it."""

    name: str
    host: _Host
    order: Order
    saved: Path | None
    status: StreamStatus
    refused: str | None = None
    retry_at: float = 0.0


class RemoteStreams:
    """Streams on hosts (``engine.Streams``), which ``end`` ends.

    Raises ``UserError`` unless every host starts within ``start_seconds``. ``add_spare`` adds hosts without streams,
    each of which takes the place of one that is lost; that is a spare one from then on.
    """

    def __init__(self, hosts: Sequence[RemoteHost], start_seconds: float, end: Callable[[], None]):
        self._end = end
        self._hosts = [_Host(remote, f"frame-{number}") for number, remote in enumerate(hosts, 1)]
        self._spares: list[_Host] = []
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()  # held while streams are added
        self._placing = threading.Lock()  # held, never for long, while it changes which host a stream belongs to
        self._stopping = threading.Event()
        self._description: Description
        for host in self._hosts:
            self._description = host.remote.call("describe", seconds=start_seconds)
            self._listen(host)
            threading.Thread(target=self._follow, args=(host,), name=host.name, daemon=True).start()

    def add_spare(self, remote: RemoteHost) -> None:
        """Add a host that stands by; it may still be starting, for as long as it likes."""
        spare = _Host(remote, f"spare-{len(self._spares) + 1}")
        self._spares.append(spare)
        threading.Thread(target=self._follow, args=(spare,), name=spare.name, daemon=True).start()

    @property
    def spares_ready(self) -> int:
        """How many spare hosts could take a lost one's place now."""
        return sum(spare.pulse is not None for spare in self._spares)

    @property
    def capacity(self) -> dict[str, Any]:
        """A memory's size, see ``memory_capacity``."""
        return self._description.capacity

    def workers(self) -> dict[str, WorkerHealth]:
        """The hosts by name."""
        return {host.name: host.health for host in self._hosts}

    # --- hosts

    def _follow(self, host: _Host) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self._listen(host)
            except Exception as error:  # this thread must survive
                log.error("what the %s worker says cannot be understood", host.name, exc_info=error)

    def _listen(self, host: _Host) -> None:
        """Take a host's pulse, and see to it that it has its streams and no others.

        It lacks them if it has taken a dead one's place, and has others if it could not be told to drop them.
        """
        try:
            pulse: Pulse = host.remote.call("pulse")
            for path, stream in list(host.streams.items()):
                if path not in pulse.statuses and time.monotonic() >= stream.retry_at:
                    self._give(stream)
            for path in set(pulse.statuses).difference(list(host.streams)):
                host.remote.call("remove", path, seconds=ADD_SECONDS)
        except HostAwayError as error:
            if host.pulse is not None and not self._stopping.is_set():
                log.warning("the %s worker is away: %s", host.name, error)
            host.pulse = None
            gone = isinstance(error, HostDiedError) or time.monotonic() - host.heard > SILENT_SECONDS
            if gone and not self._stopping.is_set():
                self._replace(host)
            return
        if host.id not in (None, pulse.id):
            host.restarts += 1
        host.pulse, host.id, host.heard = pulse, pulse.id, time.monotonic()
        for path, status in pulse.statuses.items():
            if (known := host.streams.get(path)) is not None:
                known.status = replace(status, name=known.name, source=known.status.source)

    def _replace(self, lost: _Host) -> None:
        """Let a spare host that is ready take a lost one's place, if there is one."""
        with self._placing:
            spare = next((spare for spare in self._spares if spare.pulse is not None), None)
            if lost not in self._hosts or spare is None:
                return
            self._hosts[self._hosts.index(lost)], self._spares[self._spares.index(spare)] = spare, lost
            lost.name, spare.name = spare.name, lost.name
            spare.restarts, lost.restarts = lost.restarts + 1, 0
            for stream in lost.streams.values():
                stream.status, stream.host = replace(stream.status, state="reconnecting", error=AWAY), spare
            spare.streams, lost.streams = lost.streams, {}
        log.warning("a spare worker is the %s worker now", spare.name)
        self._listen(spare)

    def _give(self, stream: _Stream) -> None:
        """Give a stream to its host, with its last snapshot; note if the host refuses it."""
        with stream.host.lock:
            if stream.order.path not in stream.host.streams:
                return  # removed
            try:
                saved = stream.saved.read_bytes() if stream.saved is not None and stream.saved.exists() else None
                stream.host.remote.call("add", replace(stream.order, saved=saved), seconds=ADD_SECONDS)
                stream.refused = None
                stream.status = replace(stream.status, state="starting", error=None, lag=None)
            except HostAwayError:
                raise
            except (UserError, OSError) as error:
                stream.refused, stream.retry_at = str(error), time.monotonic() + REFUSED_SECONDS

    # --- streams

    def add(self, name: str, source: Source, saved: Path | None = None, carry: bool = False) -> None:
        """See ``engine.Streams``; the host with the fewest streams gets it."""
        with self._lock:
            if name in self._streams:
                raise UserError(f"there is a stream called {name!r} already; choose another name, or remove it first")
            files = _carried(Path(source.name)) if carry else None
            source = replace(source, size=self._description.size)
            order = Order(f"{name}.{secrets.token_hex(8)}", source, files=files)
            with self._placing:
                host = min(self._hosts, key=lambda host: (host.pulse is None, len(host.streams)))
                stream = _Stream(name, host, order, saved, StreamStatus.of(name, source, None))
                host.streams[order.path] = self._streams[name] = stream
            try:
                self._give(stream)
            except HostAwayError as error:
                log.warning("stream %r waits for the %s worker: %s", name, stream.host.name, error)
            if stream.refused is not None:
                self._forget(stream)
                raise UserError(stream.refused)

    def _forget(self, stream: _Stream) -> None:
        with self._placing:
            self._streams.pop(stream.name, None)
            stream.host.streams.pop(stream.order.path, None)

    def remove(self, name: str) -> None:
        """Stop watching ``name``; a host that is away drops it when it is back, if it still has it."""
        stream = self._stream(name)
        with stream.host.lock:
            self._forget(stream)
            try:
                stream.host.remote.call("remove", stream.order.path, seconds=ADD_SECONDS)
            except HostAwayError as error:
                log.warning("stream %r was not taken from the %s worker: %s", name, stream.host.name, error)

    def names(self) -> list[str]:
        """The names of the watched streams."""
        return list(self._streams)

    def _stream(self, name: str) -> _Stream:
        try:
            return self._streams[name]
        except KeyError:
            raise UserError(f"no stream is called {name!r}") from None

    def source(self, name: str) -> Source:
        """What the stream watches."""
        return self._stream(name).order.source

    def sink(self, name: str) -> "RemoteSink | None":
        """Where the frames of a pushed stream go; None for other streams."""
        stream = self._stream(name)
        return RemoteSink(stream) if stream.order.source.is_push else None

    def shared_state(self, name: str) -> "RemoteState":
        """What is published of the stream."""
        stream = self._stream(name)
        return RemoteState(stream, [entry[0] for entry in self._description.layout])

    def about(self, path: str) -> About:
        """The stream whose state has that path; raises ``UserError`` if there is none."""
        for host in self._hosts:
            if path in host.streams:
                return About(path, host.remote)
        raise UserError("the stream is not watched any more")

    def status(self, name: str) -> StreamStatus:
        """The stream's status, as of its host's last pulse."""
        stream = self._stream(name)
        status = stream.status
        if stream.refused is not None:
            return replace(status, state="failed", error=stream.refused)
        if status.lag is not None:
            status = replace(status, lag=status.lag + time.monotonic() - stream.host.heard)
        if stream.host.pulse is None:
            return replace(status, state="reconnecting", error=AWAY)
        return status

    def close(self) -> None:
        """End the hosts. Safe to call twice."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._end()


def _carried(place: Path) -> dict[str, bytes]:
    """The files of a source by name; a single one has none."""
    if place.is_dir():
        return {file.name: file.read_bytes() for file in sorted(place.iterdir())}
    return {"": place.read_bytes()}


class RemoteState:
    """A stream's state on its host; while that is away or has not restored it yet, its last snapshot."""

    def __init__(self, stream: _Stream, names: Collection[str]):
        self.path, self.names = stream.order.path, names
        self._stream, self._saved = stream, stream.saved

    def read_raw(self, names: Collection[str] | None = None) -> tuple[dict[str, RawTensor], dict[str, Any]] | None:
        """See ``PublishedState``."""
        try:
            published: Published | None = self._stream.host.remote.call("read", self.path, names)
        except UserError:  # away, or just back without its streams
            published = None
        if published is not None:
            return published.tensors, published.local_notes()
        return self._snapshot(names)

    def _snapshot(self, names: Collection[str] | None) -> tuple[dict[str, RawTensor], dict[str, Any]] | None:
        if self._saved is None or not self._saved.exists():
            return None
        try:
            state, notes = load_state(self._saved)
        except Exception as error:  # of any kind, since files may hold anything
            log.warning("the snapshot %s cannot be read: %s", self._saved, error)
            return None
        shown = {name: RawTensor.of(value) for name, value in state.items() if names is None or name in names}
        return shown, {**notes, "monotonic": None}  # that clock belonged to another machine, or another run

    def read_status(self) -> dict[str, Any] | None:
        """See ``PublishedState``."""
        try:
            status: dict[str, Any] | None = self._stream.host.remote.call("read_status", self.path)
        except UserError:
            return None
        return status


class RemoteSink:
    """Takes frames for a pushed stream on a host (``engine.FrameSink``), which counts them itself."""

    def __init__(self, stream: _Stream):
        self._stream = stream
        self.taken = 0

    def write(self, number: int, frame: Frame) -> None:
        """Send a frame; raises ``HostAwayError``."""
        self.taken = self._stream.host.remote.call("push", self._stream.order.path, frame)


class RemoteQuestions:
    """Questions and watches on hosts (``engine.Questions``).

    ``ask_host`` asks any of the question workers; ``start_watcher`` starts the one that works on watches, which is not
    done before there is one. ``about`` finds a stream by its state's path.
    """

    def __init__(self, ask_host: AskHost, start_watcher: Callable[[], RemoteHost], about: Callable[[str], About]):
        self.on_report: Callable[[Report], None] = lambda report: None
        self._ask_host, self._start_watcher, self._about = ask_host, start_watcher, about
        self._watches: dict[str, Watch] = {}
        self._states: dict[str, dict[str, Any]] = {}  # what reports have brought since a watch was set
        self._lock = threading.Lock()
        self._any_watch, self._stopping = threading.Event(), threading.Event()
        self._watcher: WorkerHealth | None = None
        threading.Thread(target=self._attend, name="watches", daemon=True).start()

    def workers(self) -> dict[str, WorkerHealth]:
        """The worker of the watches; how many answer questions is the cluster's affair."""
        return {"watch": self._watcher} if self._watcher is not None else {}

    # --- questions

    def ask(
        self,
        shared_path: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Generator[Event, None, None]:
        """See ``engine.Questions``."""
        try:
            about = self._about(shared_path) if shared_path is not None else None
        except UserError as error:
            yield Event("error", str(error))
            return
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        left = threading.Event()
        # In a thread of its own, since a cluster without room for a question worker may keep a question for ever.
        asking = self._ask_host(about, question, tuple(history), max_new_tokens, tuple(stop))
        threading.Thread(target=_pump, args=(asking, events, left), name="answer", daemon=True).start()
        event, deadline = Event("text", ""), time.monotonic() + QUESTION_SECONDS + HANG_SECONDS
        try:
            while event.kind == "text":
                try:
                    event = events.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    event = BUSY
                yield event
        finally:
            left.set()

    # --- watches

    def set_watch(self, watch: Watch) -> None:
        """See ``engine.Questions``."""
        with self._lock:
            self._watches[watch.id] = watch
            self._states.pop(watch.id, None)
        self._any_watch.set()

    def drop_watch(self, watch: str) -> None:
        """See ``engine.Questions``."""
        with self._lock:
            self._watches.pop(watch, None)
            self._states.pop(watch, None)

    def _attend(self) -> None:
        """Keep the watcher's watches as they were set, and take its reports."""
        self._any_watch.wait()
        watcher: RemoteHost | None = None
        host_id, sent, restarts = "", dict[str, tuple[Watch, RemoteHost]](), -1
        while not self._stopping.is_set():
            try:
                watcher = watcher or self._start_watcher()
                told, reports = watcher.call("reports", REPORTS_SECONDS, seconds=REPORTS_SECONDS + READ_SECONDS)
                if told != host_id:
                    host_id, sent, restarts = told, {}, restarts + 1
                self._send_changes(watcher, sent)
                self._watcher = WorkerHealth(True, None, restarts)
                for report in reports:
                    self._take(report)
            except Exception as error:  # this thread must survive
                if not self._stopping.wait(REPORTS_SECONDS):
                    log.warning("the watch worker is away: %s", error)
                self._watcher = WorkerHealth(False, None, max(0, restarts))

    def _send_changes(self, watcher: RemoteHost, sent: dict[str, tuple[Watch, RemoteHost]]) -> None:
        """Set and drop what the watcher does not know yet; ``sent`` are the watches that it was given, with hosts."""
        with self._lock:
            wanted = dict(self._watches)
            states = dict(self._states)
        for number in sent.keys() - wanted.keys():
            watcher.call("drop_watch", number)
            del sent[number]
        for number, watch in wanted.items():
            try:
                about = self._about(watch.shared_path)
            except UserError:  # its stream was removed; the watch follows or is dropped
                continue
            known, host = sent.get(number, (None, None))
            if known is not watch or host is not about.host:
                watcher.call("set_watch", replace(watch, state=states.get(number, watch.state)), about)
                sent[number] = watch, about.host

    def _take(self, report: Report) -> None:
        with self._lock:
            if report.watch not in self._watches:
                return
            self._states[report.watch] = report.state
        try:
            self.on_report(report)
        except Exception as error:  # the thread must survive
            log.error("a watch's report was lost", exc_info=error)

    def close(self) -> None:
        """See ``engine.Questions``."""
        self._stopping.set()
        self._any_watch.set()


def _pump(asking: Generator[Event, None, None], events: "queue.SimpleQueue[Event]", left: threading.Event) -> None:
    """Pass events on until the last, or until the caller has left; whatever happens, there is a last."""
    try:
        for event in asking:
            if left.is_set():
                return
            events.put(event)
            if event.kind != "text":
                return
        events.put(DIED)
    except HostAwayError as error:
        events.put(Event("error", str(error)))
    except Exception as error:
        log.error("a question could not be asked", exc_info=error)
        events.put(DIED)
    finally:
        asking.close()
