"""The parent's side of live streams: keeps the frame worker alive and reads shared states."""

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_vstream.errors import UserError
from flash_vstream.live.messages import Add, Remove
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.supervisor import Supervisor
from flash_vstream.models.choice import ModelChoice
from flash_vstream.video.ring import FrameRing, ring_bytes
from flash_vstream.video.shared_memory import FOLDER_VARIABLE, OwnedFolder, check_space, shared_folder
from flash_vstream.video.sources import Source

if TYPE_CHECKING:  # which need PyTorch
    from flash_vstream.memory import MemorySnapshot
    from flash_vstream.pipeline import FlashVStream

FOLDER_KIND = "flash-vstream-live"
REMOVE_SECONDS = 10.0
"""How long removing a stream waits for the frame worker to release it."""


@dataclass(frozen=True)
class StreamStatus:
    """A live stream's status.

    ``state`` is starting, live, reconnecting, ended or failed; ``error`` gives the reason where there is one. A stream
    that ended with an error stopped short of its declared length. ``note`` is a remark about the source.
    ``fps`` is the requested rate. At that rate ``came`` frames arrived; ``kept`` of them were written and ``skipped``
    dropped in favour of newer ones. ``time`` is the stream time of the newest frame in memory, ``lag`` its age in
    seconds. ``gaps`` lists the intervals of stream time that were not watched, newest last.
    """

    name: str
    source: str
    state: str
    fps: float
    error: str | None = None
    note: str | None = None
    time: float | None = None
    came: int = 0
    kept: int = 0
    skipped: int = 0
    restarts: int = 0
    lag: float | None = None
    encode_seconds: float | None = None
    write_seconds: float | None = None
    gaps: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, name: str, source: Source, status: dict[str, Any] | None) -> "StreamStatus":
        """The status that a frame worker published for a stream; None before it has."""
        if status is None:
            return cls(name, source.shown, "starting", source.fps)
        return cls(
            name=name,
            source=source.shown,
            state=status["state"],
            fps=source.fps,
            error=status["error"],
            note=status.get("note"),
            time=status.get("time"),
            came=status.get("came", 0),
            kept=status.get("kept", 0),
            skipped=status.get("skipped", 0),
            restarts=status["restarts"],
            lag=time.monotonic() - status["monotonic"] if status.get("monotonic") else None,
            encode_seconds=status.get("encode_seconds"),
            write_seconds=status.get("write_seconds"),
            gaps=tuple((begin, end) for begin, end in status.get("gaps", ())),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class WorkerHealth:
    """A worker: whether it runs, its process's id (None while it has none), and how often it was restarted."""

    alive: bool
    pid: int | None
    restarts: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Watched:
    """A watched stream: the order to watch it, and its shared state."""

    order: Add
    shared: SharedTensors


class LiveStreams:
    """Any number of live streams, watched by one frame worker in its own process.

    >>> with LiveStreams("nano") as live:
    ...     live.add("door", Source("rtsp://camera/1"))
    ...     snapshot = live.snapshot("door", pipeline)

    Reading never waits for watching. If the frame worker dies it is restarted, and every stream resumes with its
    memory; a stream that fails does not affect the others. Shared memory lives in ``shared_folder()``; leftovers of
    killed processes are removed first. Raises ``UserError`` if the model cannot be loaded.
    """

    def __init__(self, model: str | ModelChoice):
        self._folder = OwnedFolder(FOLDER_KIND, shared_folder())
        self._watched: dict[str, _Watched] = {}
        self._made = 0
        try:
            self.worker = Supervisor(
                _watch, ModelChoice.of(model), "frame worker", self._send_all, progress=self._progress
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> "LiveStreams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity(self) -> dict[str, Any]:
        """A memory's size, see ``memory_capacity``."""
        return dict(self.worker.info["memory"])

    def workers(self) -> dict[str, WorkerHealth]:
        """The frame worker."""
        return {"frame": health(self.worker)}

    def _send_all(self, pipe: Connection) -> None:
        for watched in self._watched.values():
            pipe.send(watched.order)

    def _progress(self) -> tuple[int, ...] | None:
        """The streams' status versions, which change twice a second while the worker works; None without streams."""
        return tuple(watched.shared.status_version for watched in list(self._watched.values())) or None

    def add(self, name: str, source: Source, saved: Path | None = None, carry: bool = False) -> None:
        """Start watching ``source`` as ``name``, resuming from ``saved`` (written by ``save_state``) if it exists.

        Frames are resized to the model's input size. Raises ``UserError`` when the name is taken or there is too little
        shared memory; nothing of the stream remains then. ``carry`` changes nothing: the frame worker is on this
        machine.
        """
        with self.worker.lock:
            if name in self._watched:
                raise UserError(f"there is a stream called {name!r} already; choose another name, or remove it first")
            source = replace(source, size=self.worker.info["size"])
            self._made += 1
            folder = os.path.join(self._folder.path, str(self._made))
            try:
                os.mkdir(folder)
                watched = self._reserved(name, source, folder, saved)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, OSError):
                    raise UserError(
                        f"shared memory cannot be written ({error}); name a folder in {FOLDER_VARIABLE}"
                    ) from None
                raise
            self._watched[name] = watched
            with contextlib.suppress(OSError):  # the worker just died; its successor gets all orders
                self.worker.pipe.send(watched.order)

    def _reserved(self, name: str, source: Source, folder: str, saved: Path | None) -> "_Watched":
        """The order to watch a stream, and its shared state, with all its shared memory reserved or checked for."""
        shared = SharedTensors.create(f"{folder}/state", self.worker.info["layout"])
        ring = None
        if source.is_push:
            ring = f"{folder}/pushed"
            FrameRing(ring, source.size, create=True)
        else:
            check_space(folder, ring_bytes(source.size))  # the frame worker creates the ring
        return _Watched(Add(name, source, shared.path, str(saved) if saved is not None else None, ring), shared)

    def remove(self, name: str) -> None:
        """Stop watching ``name`` and forget it; raises ``UserError`` when there is no such stream."""
        with self.worker.lock:
            order = self.order(name)
            del self._watched[name]
            with contextlib.suppress(EOFError, OSError):  # dead; its successor does not get this order
                self.worker.pipe.send(Remove(name))
                deadline = time.monotonic() + REMOVE_SECONDS
                while self.worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                    if self.worker.pipe.recv() == order.shared_path:
                        break
            shutil.rmtree(os.path.dirname(order.shared_path), ignore_errors=True)

    def names(self) -> list[str]:
        """The names of the watched streams."""
        return list(self._watched)

    def _of(self, name: str) -> "_Watched":
        try:
            return self._watched[name]
        except KeyError:
            raise UserError(f"no stream is called {name!r}") from None

    def order(self, name: str) -> Add:
        """The order that ``add`` made for the stream; raises ``UserError`` when there is no such stream."""
        return self._of(name).order

    def source(self, name: str) -> Source:
        """What the stream watches; raises ``UserError`` when there is no such stream."""
        return self.order(name).source

    def sink(self, name: str) -> FrameRing | None:
        """Where the frames of a pushed stream go; None for other streams."""
        order = self.order(name)
        return FrameRing(order.ring, order.source.size) if order.ring is not None else None

    def shared_state(self, name: str) -> SharedTensors:
        """The stream's shared state; raises ``UserError`` when there is no such stream."""
        return self._of(name).shared

    def snapshot(self, name: str, pipeline: "FlashVStream") -> "MemorySnapshot | None":
        """A snapshot of the stream's memory as of its newest frame; None before the first."""
        from flash_vstream.live.stream_state import read_snapshot

        return read_snapshot(self.shared_state(name), pipeline)

    def status(self, name: str) -> StreamStatus:
        """The stream's status."""
        watched = self._of(name)
        return StreamStatus.of(name, watched.order.source, watched.shared.read_status())

    def close(self) -> None:
        """Stop watching: end the frame worker and the readers and free shared memory. Safe to call twice."""
        self.worker.close()
        self._folder.cleanup()


def _watch(model: ModelChoice, orders: Connection) -> None:
    """The frame worker's process, which alone imports what it needs."""
    from flash_vstream.live.frame_worker import run_frame_worker

    run_frame_worker(model, orders)


def health(worker: Supervisor) -> WorkerHealth:
    """A supervised worker's health."""
    return WorkerHealth(worker.alive, worker.pid, worker.restarts)
