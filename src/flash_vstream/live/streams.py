"""Live streams from the side of those who ask: the frame worker is kept alive, states are read."""

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.frame_worker import Add, Remove, run_frame_worker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import MEMORY, memory_state
from flash_vstream.live.supervisor import Supervisor
from flash_vstream.memory import MemorySnapshot
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video.capture import FrameRing, shared_folder
from flash_vstream.video.sources import Source


@dataclass(frozen=True)
class StreamStatus:
    """How a live stream is doing.

    ``state`` is starting, live, reconnecting, ended or failed, with ``error`` where it says why.
    ``came`` frames came at the wanted rate, ``kept`` were written, ``skipped`` passed over for
    newer ones. ``lag`` is the wall-clock age in seconds of the newest frame in memory. ``gaps`` are
    the stretches of stream time in which nobody watched, newest last. ``fps`` is the wanted rate.
    """

    name: str
    source: str
    state: str
    fps: float
    error: str | None = None
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
    ...     view = live.snapshot("door", model)

    Reading never waits for watching. A frame worker that dies is started again and every stream
    goes on with the memory it had. Raises ``UserError`` for a model that cannot be loaded.
    """

    def __init__(self, model_name: str):
        self._folder = tempfile.TemporaryDirectory(prefix="flash-vstream-", dir=shared_folder())
        self._orders: dict[str, Add] = {}
        self._boards: dict[str, SharedTensors] = {}
        self._made = 0
        try:
            self.worker = Supervisor(run_frame_worker, model_name, "frame worker", self._tell_all)
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> "LiveStreams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell_all(self, pipe: Connection) -> None:
        for order in self._orders.values():
            pipe.send(order)

    def add(self, name: str, source: Source, saved: Path | None = None) -> None:
        """Begin to watch ``source`` as ``name``, going on from ``saved`` (of ``save_state``) if it is there.

        Its frames get the size that the model takes. Raises ``UserError`` when the name is taken.
        """
        with self.worker.lock:
            if name in self._orders:
                raise UserError(f"there is a stream called {name!r} already; choose another name, or remove it first")
            self._made += 1
            path = str(Path(self._folder.name) / f"state-{self._made}")
            source = replace(source, size=self.worker.info["size"])
            ring = f"{path}.ring" if source.is_push else None
            if ring is not None:
                FrameRing(ring, source.size, create=True)
            order = Add(name, source, path, str(saved) if saved is not None else None, ring)
            self._orders[name] = order
            with contextlib.suppress(OSError):  # it has just died, and the next one is told of every stream
                self.worker.pipe.send(order)

    def remove(self, name: str) -> None:
        """Stop watching ``name`` and forget it; raises ``UserError`` when there is no such stream."""
        with self.worker.lock:
            order = self.order(name)
            del self._orders[name]
            self._boards.pop(name, None)
            try:
                self.worker.pipe.send(Remove(name))
                if self.worker.pipe.poll(10):
                    self.worker.pipe.recv()
            except (EOFError, OSError):
                pass  # dead, and the next one will not be told of this stream
            for path in (order.shared, order.ring):
                if path is not None:
                    Path(path).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The streams that are watched."""
        return list(self._orders)

    def order(self, name: str) -> Add:
        """What was asked for with ``add``; raises ``UserError`` when there is no such stream."""
        if name not in self._orders:
            raise UserError(f"no stream is called {name!r}; there are {', '.join(self._orders) or 'none'}")
        return self._orders[name]

    def shared(self, name: str) -> SharedTensors | None:
        """The stream's shared state, None until the frame worker has made it."""
        order = self.order(name)
        if name not in self._boards and Path(order.shared).exists():
            self._boards[name] = SharedTensors(order.shared)
        return self._boards.get(name)

    def snapshot(self, name: str, pipeline: FlashVStream) -> MemorySnapshot | None:
        """The stream's memory as of its newest frame, None before the first."""
        shared = self.shared(name)
        return read_snapshot(shared, pipeline) if shared is not None else None

    def status(self, name: str) -> StreamStatus:
        """How the stream is doing."""
        shared, source = self.shared(name), self.order(name).source
        known = shared.read((MEMORY + "time", MEMORY + "frames")) if shared is not None else None
        if known is None:
            return StreamStatus(name, source.shown, "starting", source.fps)
        state, notes = known
        return StreamStatus(
            name=name,
            source=source.shown,
            state=notes["state"],
            fps=source.fps,
            error=notes["error"],
            time=float(state[MEMORY + "time"]) if int(state[MEMORY + "frames"]) else None,
            came=notes["came"],
            kept=notes["kept"],
            skipped=notes["skipped"],
            restarts=notes["restarts"],
            lag=time.time() - notes["clock"] if notes["clock"] else None,
            encode_seconds=notes["encode_seconds"],
            write_seconds=notes.get("write_seconds"),
            gaps=tuple((begin, end) for begin, end in notes["gaps"]),
        )

    def close(self) -> None:
        """Stop watching; the frame worker and the readers end."""
        self.worker.close()
        self._folder.cleanup()


def read_snapshot(shared: SharedTensors, pipeline: FlashVStream) -> MemorySnapshot | None:
    """The newest memory in a shared state, None before its first frame."""
    known = shared.read()
    if known is None:
        return None
    memory = pipeline.new_stream().memory
    memory.load_state_dict(memory_state(known[0]))
    return memory.read() if memory.frames else None
