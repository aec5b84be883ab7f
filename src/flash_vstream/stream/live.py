"""Live streams from the side of those who ask: the frame handler is kept alive, memories are read."""

import atexit
import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.memory import MemoryView, StarMemory
from flash_vstream.stream.api import FlashVStream
from flash_vstream.stream.board import StateBoard
from flash_vstream.stream.frame_handler import Add, Remove, run_frame_handler
from flash_vstream.video.process import shared_folder
from flash_vstream.video.sources import Source

START_SECONDS = 120.0


@dataclass(frozen=True)
class StreamStatus:
    """How a live stream is doing.

    ``state`` is starting, live, reconnecting, ended or failed, with ``error`` where it says why.
    ``came`` frames came at the wanted rate, ``kept`` were written, ``skipped`` passed over for
    newer ones. ``lag`` is the wall-clock age in seconds of the newest frame in memory.
    """

    name: str
    source: str
    state: str
    error: str | None
    time: float | None
    came: int
    kept: int
    skipped: int
    restarts: int
    lag: float | None
    encode_seconds: float | None


class LiveStreams:
    """Streams that are watched in a process of their own while questions are asked in this one.

    >>> with LiveStreams(model, "nano") as live:
    ...     live.add("door", Source("rtsp://camera/1", fps=2))
    ...     answer = model.ask(live.snapshot("door"), "Who is at the door?")

    A frame handler that dies is started again within a second and goes on with the memories as
    they were.
    """

    def __init__(self, model: FlashVStream, model_name: str):
        memory = model.new_stream().memory
        if not isinstance(memory, StarMemory):
            raise UserError("live streams need a memory of constant size; compat='release' has none")
        self._model = model
        self._model_name = model_name
        self._template = {name: value.clone() for name, value in memory.state_dict().items()}
        self._folder = tempfile.TemporaryDirectory(prefix="flash-vstream-", dir=shared_folder())
        self._orders: dict[str, Add] = {}
        self._boards: dict[str, StateBoard] = {}
        self._lock = threading.RLock()
        self._pipe: Connection | None = None
        self._process: Any = None
        self._stopping = threading.Event()
        self.handler_restarts = -1
        self._start_handler()
        atexit.register(self.close)  # or the interpreter would wait for the frame handler for ever
        self._guard = threading.Thread(target=self._watch_over, name="guard", daemon=True)
        self._guard.start()

    def __enter__(self) -> "LiveStreams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def handler_pid(self) -> int:
        """The frame handler's process id."""
        return int(self._process.pid)

    def _start_handler(self) -> None:
        context = multiprocessing.get_context("spawn")
        with self._lock:
            self._pipe, child = context.Pipe()
            # Not a daemon: it has children of its own, the readers.
            self._process = context.Process(target=run_frame_handler, args=(self._model_name, child), daemon=False)
            self._process.start()
            child.close()
            self.handler_restarts += 1
            if not self._pipe.poll(START_SECONDS):
                self._process.kill()
                raise UserError(f"the frame handler did not start within {START_SECONDS:.0f} s")
            try:
                said = self._pipe.recv()
            except EOFError:
                said = "the frame handler died while it started"
            if said != "ready":
                raise UserError(said)
            for order in self._orders.values():
                self._pipe.send(order)

    def _watch_over(self) -> None:
        """Restart the frame handler when it dies."""
        while not self._stopping.wait(0.2):
            if not self._process.is_alive():
                try:
                    self._start_handler()
                except (UserError, OSError):
                    self._stopping.wait(1.0)  # and try again

    def add(self, name: str, source: Source) -> None:
        """Begin to watch ``source`` as ``name``; raises ``UserError`` when the name is taken."""
        with self._lock:
            if name in self._orders:
                raise UserError(f"there is a stream called {name!r} already")
            path = str(Path(self._folder.name) / f"board-{len(self._boards)}-{time.monotonic_ns()}")
            self._boards[name] = StateBoard(path, self._template)
            self._orders[name] = Add(name, source, path)
            assert self._pipe is not None
            self._pipe.send(self._orders[name])

    def remove(self, name: str) -> None:
        """Stop watching ``name`` and forget it; raises ``UserError`` when there is no such stream."""
        with self._lock:
            board = self._board(name)
            del self._orders[name], self._boards[name]
            assert self._pipe is not None
            self._pipe.send(Remove(name))
            if self._pipe.poll(10):
                self._pipe.recv()
            Path(board.path).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The streams that are watched."""
        return list(self._orders)

    def snapshot(self, name: str) -> MemoryView | None:
        """The stream's memory as of its newest frame, None before the first."""
        known = self._board(name).read()
        if known is None:
            return None
        memory = self._model.new_stream().memory
        memory.load_state_dict(known[0])
        return memory.read() if memory.frames else None

    def status(self, name: str) -> StreamStatus:
        """How the stream is doing."""
        board = self._board(name)
        known = board.read()
        source = self._orders[name].source.shown
        if known is None:
            return StreamStatus(name, source, "starting", None, None, 0, 0, 0, 0, None, None)
        state, notes = known
        moment = float(state["time"]) if int(state["frames"]) else None
        return StreamStatus(
            name=name,
            source=source,
            state=notes["state"],
            error=notes["error"],
            time=moment,
            came=notes["came"],
            kept=notes["kept"],
            skipped=notes["skipped"],
            restarts=notes["restarts"],
            lag=time.time() - notes["clock"] if notes["clock"] else None,
            encode_seconds=notes["encode_seconds"],
        )

    def _board(self, name: str) -> StateBoard:
        if name not in self._boards:
            raise UserError(f"no stream is called {name!r}; there are {', '.join(self._boards) or 'none'}")
        return self._boards[name]

    def close(self) -> None:
        """Stop watching; the frame handler and the readers end."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        atexit.unregister(self.close)
        self._guard.join(timeout=5)
        try:
            assert self._pipe is not None
            self._pipe.send(None)
        except OSError:
            pass
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()
