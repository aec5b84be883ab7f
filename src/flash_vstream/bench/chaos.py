"""``bench chaos``: everything that can happen to a server, to one server, at once.

For a given time, a real server on loopback meets generated requests (schemathesis), mutated media, a random mix of well
and badly behaved callers, kills of each of its processes and of itself, a full disk and a stepped clock, while witness
streams are watched all along. At the end it must hold nothing that callers or the dead have left behind.

What is done is drawn from a seed; how it falls together in time is not repeatable.
"""

import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flash_vstream.bench.chaos_blows import KINDS, Blows
from flash_vstream.bench.chaos_callers import Caller, Tally
from flash_vstream.bench.chaos_fuzz import check_installed, fuzz
from flash_vstream.bench.chaos_media import MutatedMedia, write_clip
from flash_vstream.bench.chaos_report import judge, leaks, print_report
from flash_vstream.bench.chaos_server import ServerUnderTest, command_of
from flash_vstream.bench.chaos_witnesses import Witnesses
from flash_vstream.bench.chaos_world import PUSH_FPS, World
from flash_vstream.errors import UserError
from flash_vstream.models.hub import fetch_model
from flash_vstream.video.shared_memory import shared_folder

CALLERS = 2
WITNESS_FPS = 2.0
CALM_SECONDS = 5.0
"""How long the witnesses are watched before anything is disturbed."""
SETTLE_SECONDS = 150.0
"""How long the server may take, when all is over, to let go of what callers had: a question may take 120 s."""
LAST_SECONDS = 60.0
"""How long the helpers of Python's multiprocessing may outlive the server."""
LOWER_PRIORITY = 5
PROCESSES = {"forkserver": "fork server and workers", "resource_tracker": "tracker", "spawn_main": "readers"}
"""Kinds of the server's processes, by what their command lines hold."""


def run_chaos(model: str, minutes: float, seed: int) -> bool:
    """Run the benchmark and print its report, a table on stderr and JSON on stdout; whether every promise was kept.

    Raises ``UserError`` if something that it needs is missing.
    """
    check_installed()
    if not minutes > 0:
        raise UserError(f"--minutes is {minutes:g}; it must be above 0")
    console = Console(stderr=True)
    with console.status(f"loading {model}") as status:
        fetch_model(model, status.update)
    with (
        _folder() as folder,
        _folder(shared_folder()) as shared,
    ):
        chaos = Chaos(model, seed, Path(folder).resolve(), Path(shared).resolve(), console)
        report = chaos.run(60 * minutes)
    print_report(report, console)
    return not report["broken"]


def _folder(within: str | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder for the run. After Ctrl-C, callers may still write to it while it is removed."""
    return tempfile.TemporaryDirectory(prefix="flash-vstream-chaos-", dir=within, ignore_cleanup_errors=True)


@dataclass(frozen=True)
class Holdings:
    """What a server holds while it only watches the witnesses."""

    processes: dict[str, int]
    descriptors: dict[str, int]
    shared_files: int
    temporary_files: list[str]
    questions: int
    clips: int


class Chaos:
    """One run: a server, its witnesses, those who call it and those who strike it.

    Of the blows, only ``kinds`` are dealt. With ``callers`` 0 there is no schemathesis either.
    """

    def __init__(
        self,
        model: str,
        seed: int,
        folder: Path,
        shared: Path,
        console: Console,
        kinds: Sequence[str] = KINDS,
        callers: int = CALLERS,
    ):
        self.seed, self.folder, self.console, self.callers = seed, folder, console, callers
        self.server = ServerUnderTest(model, folder, shared)
        self.tally = Tally(self.server)
        (folder / "media").mkdir()
        clip = write_clip(folder / "witness.mp4", "mpeg4", (320, 180), frames=100)
        self.world = World(folder / "media", self.server.port, "witness-push")
        rates = {"witness-file": WITNESS_FPS, "witness-camera": WITNESS_FPS, "witness-push": PUSH_FPS}
        self.witnesses = Witnesses(self.server, rates)
        camera, file = ("witness-camera", self.world.camera_port), ("witness-file", str(clip))
        self.blows = Blows(self.server, self.witnesses, self.tally, camera, file, seed, kinds)
        self.sources: dict[str, dict[str, Any]] = {
            "witness-file": {"source": str(clip), "fps": WITNESS_FPS, "loop": True},
            "witness-camera": {"source": self.world.camera, "fps": WITNESS_FPS},
            "witness-push": {"source": "push", "fps": PUSH_FPS},
        }

    def run(self, seconds: float) -> dict[str, Any]:
        """Run every phase and return the report."""
        started = time.monotonic()
        with ExitStack() as cleanup, self._progress(seconds) as tell:
            cleanup.callback(self.world.close)
            cleanup.callback(self.server.end_all)
            tell("starting the server")
            self.server.start()
            tell("watching the witnesses")
            before = self._begin()
            self._disturb(seconds, tell)
            tell("waiting for the server to let go")
            after = self._settled(before)
            self.blows.count_last_restarts()
            self.witnesses.stop()
            slowness = self.world.slowness()
            tell("stopping the server")
            left = self._stop()
        return judge(self, before, after, left, slowness, time.monotonic() - started)

    def _begin(self) -> Holdings:
        """Create the witnesses, use every kind of request once, and take stock when all is calm."""
        for name, source in self.sources.items():
            self.server.call("POST", "/v1/streams", {"name": name, **source}).raise_for_status()
        self.witnesses.start()
        self._until(lambda: self.witnesses.all_since(0.0), "a frame of every witness")
        if self.callers:
            for action, _ in self._caller("first").actions:
                action()
        time.sleep(CALM_SECONDS)
        self._remove_others()
        return self._calm()

    def _caller(self, name: str) -> Caller:
        media = MutatedMedia(self.folder, random.Random(f"{self.seed}/media/{name}"))
        return Caller(name, self.seed, self.tally, media, self.folder / "media", self.world.media)

    def _disturb(self, seconds: float, tell: Callable[[str], None]) -> None:
        over = threading.Event()
        callers = [partial(self._caller(f"caller{i}").run, over) for i in range(self.callers)]
        if callers:
            callers.append(partial(fuzz, self.tally, self.seed, self.folder, over))
        work = [partial(_at_lower_priority, run) for run in callers]
        work.append(partial(self.blows.run, over))  # it starts servers, which inherit its priority
        failures: list[BaseException] = []

        def guarded(function: Callable[[], None]) -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in work]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        # However slow the machine is, every kind of blow is dealt once.
        while (time.monotonic() < deadline or not self.blows.rounds) and not failures:
            counts = Counter(blow.kind for blow in self.blows.dealt)
            tell(f"{sum(self.tally.statuses.values()):,} requests, {sum(counts.values())} blows")
            time.sleep(0.5)
        over.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    # --- taking stock

    def _remove_others(self) -> None:
        for status in self.server.get("/v1/streams") or []:
            if status["name"] not in self.sources:
                self.server.call("DELETE", f"/v1/streams/{status['name']}")

    def _holdings(self) -> Holdings:
        kinds = Counter(
            next((kind for sign, kind in PROCESSES.items() if sign in command_of(process)), "server")
            for process in self.server.processes()
        )
        workers = self.server.workers()
        gauges = self.server.gauges()
        return Holdings(
            processes=dict(kinds),
            descriptors={kind: workers[kind].num_fds() for kind in sorted(workers)}
            | {"server": self.server.descriptors()},
            shared_files=sum(path.is_file() for path in self.server.shared.rglob("*")),
            temporary_files=sorted(_kind_of(path) for path in self.server.temporary.rglob("*")),
            questions=int(gauges["flash_vstream_questions_in_progress"]),
            clips=int(gauges["flash_vstream_clips_in_progress"]),
        )

    def _calm(self) -> Holdings:
        """What the server holds, when it has been the same twice in a row."""
        deadline, last = time.monotonic() + SETTLE_SECONDS, None
        while time.monotonic() < deadline:
            time.sleep(1)
            if (held := self._holdings()) == last:
                return held
            last = held
        assert last is not None
        return last

    def _settled(self, before: Holdings) -> Holdings:
        """What the server holds after everybody has left: as soon as nothing leaks, else when the time is over."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self._remove_others()
            held = self._holdings()
            if not leaks(before, held) or time.monotonic() > deadline:
                return held
            time.sleep(1)

    def _stop(self) -> dict[str, Any]:
        """Stop the server; what is left of it then."""
        before = self.server.processes()
        code = self.server.stop()
        _, alive = psutil.wait_procs(before, LAST_SECONDS)
        return {
            "exit_code": code,
            "processes": [command_of(process)[-120:] for process in alive],
            "shared_files": [str(path.relative_to(self.server.shared)) for path in self.server.shared.rglob("*")],
            "temporary_files": [path.name for path in self.server.temporary.rglob("*")],
        }

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise UserError(f"there was no {what} within {SETTLE_SECONDS:.0f} s: {' '.join(self.server.warnings)}")
            time.sleep(0.1)

    @contextmanager
    def _progress(self, seconds: float) -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=seconds)
            started = time.monotonic()

            def tell(text: str) -> None:
                progress.update(task, description=text, completed=min(seconds, time.monotonic() - started))

            yield tell


def _at_lower_priority(run: Callable[[], None]) -> None:
    """Run this thread so that it does not take the processor from the server that it disturbs."""
    if sys.platform == "linux":  # elsewhere priorities are those of whole processes
        os.nice(LOWER_PRIORITY)
    run()


def _kind_of(path: Path) -> str:
    """A temporary file's name without its random ending."""
    return path.name.rpartition("-")[0] or path.name
