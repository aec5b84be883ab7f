"""Live streams from the side of those who ask: the frame worker is kept alive, shared states are read."""

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.frame_worker import Add, Remove, run_frame_worker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import read_memory
from flash_vstream.live.supervisor import Supervisor
from flash_vstream.memory import MemorySnapshot
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video.ring import FrameRing, ring_bytes
from flash_vstream.video.shared_memory import OwnedFolder, check_space, shared_folder
from flash_vstream.video.sources import Source

FOLDER_KIND = "flash-vstream-live"
REMOVE_SECONDS = 10.0
"""How long the removal of a stream waits until the frame worker has let go of it."""


@dataclass(frozen=True)
class StreamStatus:
    """How a live stream is doing.

    ``state`` is starting, live, reconnecting, ended or failed, with ``error`` where it says why. A stream that ended
    with an error broke off before the length that it declares. ``note`` is what else should be known of its source.
    ``fps`` is the wanted rate. ``came`` frames came at the wanted rate, ``kept`` were written,
    ``skipped`` passed over for newer ones. ``time`` is the stream time of the newest frame in memory, ``lag`` its
    age in wall-clock seconds. ``gaps`` are the stretches of stream time in which nobody watched, newest last.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class LiveStreams:
    """Any number of live streams, watched by one frame worker in a process of its own.

    >>> with LiveStreams("nano") as live:
    ...     live.add("door", Source("rtsp://camera/1"))
    ...     snapshot = live.snapshot("door", pipeline)

    Reading never waits for watching. A frame worker that dies is started again and every stream goes on with the
    memory it had; a stream that fails leaves the others alone. Shared memory lies in ``shared_folder()``; what a
    killed process left there is removed first. Raises ``UserError`` for a model that cannot be loaded.
    """

    def __init__(self, model_name: str):
        self._folder = OwnedFolder(FOLDER_KIND, shared_folder())
        self._orders: dict[str, Add] = {}
        self._shared_states: dict[str, SharedTensors] = {}
        self._made = 0
        try:
            self.worker = Supervisor(
                run_frame_worker, model_name, "frame worker", self._send_all, progress=self._progress
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> "LiveStreams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_all(self, pipe: Connection) -> None:
        for order in self._orders.values():
            pipe.send(order)

    def _progress(self) -> tuple[int, ...] | None:
        """What changes twice a second while the frame worker works: how often each stream's status was published."""
        return tuple(shared.status_version for shared in list(self._shared_states.values())) or None

    def add(self, name: str, source: Source, saved: Path | None = None) -> None:
        """Begin to watch ``source`` as ``name``, going on from ``saved`` (of ``save_state``) if it is there.

        Its frames get the size that the model takes. Raises ``UserError`` when the name is taken or there is too
        little shared memory; nothing is left of the stream then.
        """
        with self.worker.lock:
            if name in self._orders:
                raise UserError(f"there is a stream called {name!r} already; choose another name, or remove it first")
            source = replace(source, size=self.worker.info["size"])
            self._made += 1
            folder = os.path.join(self._folder.path, str(self._made))
            os.mkdir(folder)
            try:
                order, shared = self._reserved(name, source, folder, saved)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._orders[name], self._shared_states[name] = order, shared
            with contextlib.suppress(OSError):  # it has just died, and the next one is told of every stream
                self.worker.pipe.send(order)

    def _reserved(self, name: str, source: Source, folder: str, saved: Path | None) -> tuple[Add, SharedTensors]:
        """The order to watch a stream, with all the shared memory that it will need."""
        shared = SharedTensors.create(f"{folder}/state", self.worker.info["layout"])
        ring = None
        if source.is_push:
            ring = f"{folder}/pushed"
            FrameRing(ring, source.size, create=True)
        else:
            check_space(folder, ring_bytes(source.size))  # the frame worker makes it
        return Add(name, source, shared.path, str(saved) if saved is not None else None, ring), shared

    def remove(self, name: str) -> None:
        """Stop watching ``name`` and forget it; raises ``UserError`` when there is no such stream."""
        with self.worker.lock:
            order = self.order(name)
            del self._orders[name], self._shared_states[name]
            with contextlib.suppress(EOFError, OSError):  # dead, and the next one is not told of this stream
                self.worker.pipe.send(Remove(name))
                deadline = time.monotonic() + REMOVE_SECONDS
                while self.worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                    if self.worker.pipe.recv() == order.shared_path:
                        break
            shutil.rmtree(os.path.dirname(order.shared_path), ignore_errors=True)

    def names(self) -> list[str]:
        """The streams that are watched."""
        return list(self._orders)

    def order(self, name: str) -> Add:
        """What was asked for with ``add``; raises ``UserError`` when there is no such stream."""
        try:
            return self._orders[name]
        except KeyError:
            raise UserError(f"no stream is called {name!r}") from None

    def shared_state(self, name: str) -> SharedTensors:
        """What the stream shares; raises ``UserError`` when there is no such stream."""
        self.order(name)
        return self._shared_states[name]

    def snapshot(self, name: str, pipeline: FlashVStream) -> MemorySnapshot | None:
        """The stream's memory as of its newest frame, None before the first."""
        return read_snapshot(self.shared_state(name), pipeline)

    def status(self, name: str) -> StreamStatus:
        """How the stream is doing."""
        source = self.order(name).source
        known = self.shared_state(name).read_status()
        if known is None:
            return StreamStatus(name, source.shown, "starting", source.fps)
        return StreamStatus(
            name=name,
            source=source.shown,
            state=known["state"],
            fps=source.fps,
            error=known["error"],
            note=known.get("note"),
            time=known.get("time"),
            came=known.get("came", 0),
            kept=known.get("kept", 0),
            skipped=known.get("skipped", 0),
            restarts=known["restarts"],
            lag=time.monotonic() - known["monotonic"] if known.get("monotonic") else None,
            encode_seconds=known.get("encode_seconds"),
            write_seconds=known.get("write_seconds"),
            gaps=tuple((begin, end) for begin, end in known.get("gaps", ())),
        )

    def close(self) -> None:
        """Stop watching; the frame worker and the readers end and shared memory is given back. May be called again."""
        self.worker.close()
        self._folder.cleanup()


def read_snapshot(shared: SharedTensors, pipeline: FlashVStream) -> MemorySnapshot | None:
    """The newest memory in a shared state, None before its first frame."""
    state = read_memory(shared)
    if state is None:
        return None
    memory = pipeline.new_stream().memory
    memory.load_state_dict(state)
    return memory.read() if memory.frames else None
