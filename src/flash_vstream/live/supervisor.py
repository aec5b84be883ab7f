"""A worker process and the pipe to it, restarted whenever it dies."""

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from flash_vstream.backoff import backoff_seconds
from flash_vstream.errors import UserError
from flash_vstream.json_log import LogSettings, log_like, log_settings
from flash_vstream.live.fork_server import ensure_fork_server

START_SECONDS = 120.0
LOOK_SECONDS = 0.1
END_SECONDS = 5.0
SHORT_LIFE_SECONDS = 2.0
"""A worker that dies sooner than this after starting is restarted after a delay, which grows with each such death."""
RESTART_SECONDS = (0.2, 10.0)
"""The shortest and longest such delay; it doubles each time, with jitter."""
HANG_SECONDS = 120.0
"""A worker that makes no progress for this long is killed and restarted."""
log = logging.getLogger("flash_vstream.live")


class Supervisor:
    """Runs ``main(argument, pipe)`` in its own process and keeps it alive.

    The process sends ``("ready", info)`` when it is ready, or the reason why it cannot start, which is raised as a
    ``UserError``. ``on_start`` is called with each new pipe before anything else is sent, ``on_death`` when a process
    has died. ``progress`` returns a value that changes while the process works, or None when no change is expected.
    ``send`` blocks while a new process starts.
    """

    def __init__(
        self,
        main: Callable[[Any, Connection], None],
        argument: Any,
        name: str,
        on_start: Callable[[Connection], None],
        on_death: Callable[[], None] = lambda: None,
        progress: Callable[[], Any] = lambda: None,
    ):
        self._main, self._argument, self._name = main, argument, name
        self._on_start, self._on_death, self._progress = on_start, on_death, progress
        self.lock = threading.RLock()
        self.pipe: Connection
        self.info: dict[str, Any] = {}
        self._process: Any = None
        # psutil, since multiprocessing tracks a process through the fork server, and the process may outlive that.
        self._running: psutil.Process
        self._stopping = threading.Event()
        self._started_at = 0.0
        self.restarts = -1
        self._start()
        atexit.register(self.close)  # otherwise the interpreter would wait for the process at exit for ever
        self._guard = threading.Thread(target=self._watch_over, name=f"guard of the {name}", daemon=True)
        self._guard.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._running.pid)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        try:
            return self._running.is_running() and self._running.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def send(self, message: Any) -> None:
        """Send a message; raises ``OSError`` when the process has just died."""
        with self.lock:
            self.pipe.send(message)

    def kill(self) -> None:
        """Kill the process, for example because it hangs; it is then restarted."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._running.kill()

    def _start(self) -> None:
        context = ensure_fork_server(self._argument)
        with self.lock:
            self.pipe, child = context.Pipe()
            # Not a daemon: a worker may have children of its own.
            arguments = (log_settings(), self._main, self._argument, child)
            process = context.Process(target=_run, args=arguments, name=self._name, daemon=False)
            process.start()
            self._process = process
            child.close()
            with contextlib.suppress(psutil.NoSuchProcess):  # already dead; ``_ready`` reports it
                self._running = psutil.Process(self._process.pid)
            self.restarts += 1
            self.info = self._ready()
            self._started_at = time.monotonic()
            self._on_start(self.pipe)

    def _ready(self) -> dict[str, Any]:
        """The ``info`` that the process sends when it is ready; raises ``UserError`` if it cannot start."""
        deadline = time.monotonic() + START_SECONDS
        while not self.pipe.poll(LOOK_SECONDS):
            if self._stopping.is_set() or time.monotonic() > deadline:
                self._process.kill()
                raise UserError(f"the {self._name} did not start within {START_SECONDS:.0f} s")
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            message = f"the {self._name} died while it started"
        if isinstance(message, str):
            self._process.join(timeout=END_SECONDS)
            raise UserError(message)
        return dict(message[1])

    def _watch_over(self) -> None:
        failures, looks, progress = 0, 0, None
        while not self._stopping.wait(LOOK_SECONDS):
            if self._process.is_alive():
                # Count looks rather than seconds: if this process is itself suspended, the worker is not hanging.
                before, progress = progress, self._progress()
                looks = looks + 1 if progress is not None and progress == before else 0
                if looks * LOOK_SECONDS > HANG_SECONDS:
                    log.warning("the %s hangs and is restarted", self._name)
                    self.kill()
                    looks = 0
                continue
            looks, progress = 0, None
            try:
                ensure_fork_server(self._argument)  # perhaps only the fork server died
                if self.alive:
                    continue
                self._on_death()
                lived = time.monotonic() - self._started_at
                failures = failures + 1 if lived < SHORT_LIFE_SECONDS else 0
                if not failures or not self._stopping.wait(backoff_seconds(failures, *RESTART_SECONDS)):
                    self._start()
            except Exception as error:  # never give up: every caller would be left without a worker
                if not self._stopping.is_set():
                    log.warning("the %s could not be restarted: %s", self._name, error)
                failures += 1
                self._stopping.wait(backoff_seconds(failures, *RESTART_SECONDS))

    def close(self) -> None:
        """End the process. Safe to call twice, and while the process is starting."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        atexit.unregister(self.close)
        self._guard.join(timeout=2 * END_SECONDS)  # it keeps checking the event
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        deadline = time.monotonic() + END_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.alive:
            self.kill()
        self._process.join(timeout=END_SECONDS)


def _run(logged: LogSettings, main: Callable[[Any, Connection], None], argument: Any, pipe: Connection) -> None:
    """The process's main function: ``main``, with its log like that of the parent."""
    log_like(logged)
    main(argument, pipe)
