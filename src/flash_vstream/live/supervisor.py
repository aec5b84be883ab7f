"""A worker's process and the pipe to it, started again whenever it dies."""

import atexit
import contextlib
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from flash_vstream.errors import UserError
from flash_vstream.live.fork_server import ensure_fork_server

START_SECONDS = 120.0
LOOK_SECONDS = 0.1
END_SECONDS = 5.0


class Supervisor:
    """Runs ``main(argument, pipe)`` in a process of its own and keeps it alive.

    The process says ``("ready", info)`` once it is, or else why it cannot be. ``on_start`` is called with
    each new pipe before anything else is sent. ``send`` waits while a new process starts.
    """

    def __init__(
        self,
        main: Callable[[str, Connection], None],
        argument: str,
        name: str,
        on_start: Callable[[Connection], None],
        on_death: Callable[[], None] = lambda: None,
    ):
        self._main, self._argument, self._name = main, argument, name
        self._on_start, self._on_death = on_start, on_death
        self.lock = threading.RLock()
        self.pipe: Connection
        self.info: dict[str, Any] = {}
        self._process: Any = None
        # multiprocessing knows of a process through the one that forked it, whose own death it outlives.
        self._running: psutil.Process
        self._stopping = threading.Event()
        self.restarts = -1
        self._start()
        atexit.register(self.close)  # or the interpreter would wait for the process for ever
        self._guard = threading.Thread(target=self._watch_over, name=f"guard of the {name}", daemon=True)
        self._guard.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        try:
            return self._running.is_running() and self._running.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def send(self, message: Any) -> None:
        """Send a message; raises ``OSError`` when the process has just died."""
        with self.lock:
            self.pipe.send(message)

    def _start(self) -> None:
        context = ensure_fork_server()
        with self.lock:
            self.pipe, child = context.Pipe()
            # Not a daemon: a worker may have children of its own.
            self._process = context.Process(
                target=self._main, args=(self._argument, child), name=self._name, daemon=False
            )
            self._process.start()
            child.close()
            with contextlib.suppress(psutil.NoSuchProcess):  # it is dead already, as the pipe will tell
                self._running = psutil.Process(self._process.pid)
            self.restarts += 1
            if not self.pipe.poll(START_SECONDS):
                self._process.kill()
                raise UserError(f"the {self._name} did not start within {START_SECONDS:.0f} s")
            try:
                said = self.pipe.recv()
            except (EOFError, OSError):
                said = f"the {self._name} died while it started"
            if isinstance(said, str):
                self._process.join(timeout=5)
                raise UserError(said)
            self.info = said[1]
            self._on_start(self.pipe)

    def _watch_over(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            if self._process.is_alive():
                continue
            try:
                ensure_fork_server()  # for it may be the fork server alone that died
                if not self.alive:
                    self._on_death()
                    self._start()
            except (UserError, OSError):
                self._stopping.wait(1.0)  # and try again

    def close(self) -> None:
        """End the process."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        atexit.unregister(self.close)
        self._guard.join(timeout=5)
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        deadline = time.monotonic() + END_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.alive:
            self._running.kill()
        self._process.join()
