"""Blows of ``bench chaos``: kill -9 of every process, a full disk, a stepped clock; one after the other, at random.

After each, the witnesses must have frames again, questions must be answered and ``/healthz`` must say ok, before the
next comes.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import psutil

from flash_vstream.bench.chaos_callers import Tally
from flash_vstream.bench.chaos_server import END_SECONDS, ServerUnderTest, command_of
from flash_vstream.bench.chaos_witnesses import Gap, Witnesses

PAUSE_SECONDS = (0.3, 3.0)
RECOVERY_SECONDS = 300.0
"""How long everything may take to be well again after a blow: a starved machine takes minutes to import and to load."""
FULL_SECONDS = 60.0
"""How long the disk stays full at most: until the server says so, which it notices when it saves, every 10 s."""
CLOCK_STEPS = (3600.0, -3600.0, 86400.0, -86400.0, 0.7, -0.7, 0.0)
KILLS = ("reader", "frame worker", "question worker", "fork server", "server")
KINDS = (*KILLS, "full disk", "clock step")


@dataclass(frozen=True)
class Blow:
    """What was done, when (monotonic seconds), to which stream's reader, and how long it took until all was well."""

    kind: str
    at: float
    stream: str | None
    seconds: float

    def explains(self, name: str, gap: Gap) -> bool:
        """Whether the blow is why the witness ``name`` was without frames."""
        hit = self.kind in ("frame worker", "server") or (self.kind == "reader" and self.stream == name)
        return hit and gap.start - self.seconds <= self.at <= gap.end


class Blows:
    """Deals blows in rounds of every one of ``kinds``, in random order.

    ``camera`` and ``file`` are witnesses' names, with the port and the path that their readers have open.
    """

    def __init__(
        self,
        server: ServerUnderTest,
        witnesses: Witnesses,
        tally: Tally,
        camera: tuple[str, int],
        file: tuple[str, str],
        seed: int,
        kinds: Sequence[str] = KINDS,
    ):
        self.server, self.witnesses, self.tally = server, witnesses, tally
        self._camera, self._file, self._kinds = camera, file, kinds
        self.rng = random.Random(f"{seed}/blows")
        self.dealt: list[Blow] = []
        self.rounds = 0
        """How often every kind was dealt."""
        self.skipped: dict[str, str] = {}
        self.broken: list[str] = []
        self._ways: dict[str, Callable[[], str | None]] = {
            "reader": self._kill_reader,
            "frame worker": lambda: self._kill_worker("frame"),
            "question worker": lambda: self._kill_worker("question"),
            "fork server": self._kill_fork_server,
            "server": self._kill_server,
            "full disk": self._fill_disk,
            "clock step": self._step_clock,
        }

    def run(self, over: threading.Event) -> None:
        """Deal blows until ``over``; the last one's recovery is awaited."""
        while True:
            for kind in self.rng.sample(self._kinds, len(self._kinds)):
                if over.wait(self.rng.uniform(*PAUSE_SECONDS)):
                    return
                if kind not in self.skipped:
                    self._deal(kind)
            self.rounds += 1

    def _deal(self, kind: str) -> None:
        at = time.monotonic()
        try:
            stream = self._ways[kind]()
        except (psutil.Error, _MissedError):
            return  # the victim was gone already
        self._recover(kind, time.monotonic() if kind in ("server", "full disk") else at)
        self.dealt.append(Blow(kind, at, stream, time.monotonic() - at))
        self.witnesses.check_memories()

    def _recover(self, kind: str, since: float) -> None:
        """Wait until every witness has a new frame, nothing restarts, and a question is answered."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        waiting_for = ["frames of every witness", "health", "an answer"]
        while waiting_for and time.monotonic() < deadline:
            time.sleep(0.1)
            if waiting_for[0].startswith("frames"):
                well = self.witnesses.all_since(since)
            elif waiting_for[0] == "health":
                well = self._health() in ("ok", "degraded")  # a failed stream of a caller degrades it
            else:
                well = self._is_answered()
            if well:
                waiting_for.pop(0)
        if waiting_for:
            self.broken.append(f"{RECOVERY_SECONDS:.0f} s after a blow ({kind}) there was no {waiting_for[0]}")

    def _health(self) -> str | None:
        health = self.server.get("/healthz")
        return health["status"] if health else None

    def _is_answered(self) -> bool:
        body = {"question": "What is happening?", "max_new_tokens": 2}
        return self.tally.ask("/v1/streams/witness-file/questions", body)

    # --- the blows

    def _kill_reader(self) -> str | None:
        readers = self.server.readers()
        if not readers:
            raise _MissedError
        streams = {reader: self._stream_of(reader) for reader in readers}
        witnessed = [reader for reader, stream in streams.items() if stream is not None]
        victim = self.rng.choice(witnessed if witnessed and self.rng.random() < 0.7 else readers)
        victim.kill()
        return streams[victim]

    def _stream_of(self, reader: psutil.Process) -> str | None:
        """Which witness a process reads, by the file or the connection that it has open; None for other streams."""
        with contextlib.suppress(psutil.Error):
            if any(file.path == self._file[1] for file in reader.open_files()):
                return self._file[0]
            if any(peer.raddr and peer.raddr.port == self._camera[1] for peer in reader.net_connections("tcp")):
                return self._camera[0]
        return None

    def _kill_worker(self, kind: str) -> None:
        worker = self.server.workers().get(kind)
        if worker is None:
            raise _MissedError
        worker.kill()
        self.server.life.kills += 1

    def _kill_fork_server(self) -> None:
        fork_server = self.server.fork_server()
        if fork_server is None:
            raise _MissedError
        fork_server.kill()

    def _kill_server(self) -> None:
        """Kill the server. Half of the time a new one starts at once, else when the old one's processes have ended."""
        self._count_restarts()
        before = self.server.processes()
        self.server.kill()
        at_once = self.rng.random() < 0.5
        if not at_once:
            psutil.wait_procs(before, END_SECONDS)
        self.server.start()
        _, alive = psutil.wait_procs(before, END_SECONDS)
        if alive:
            names = ", ".join(command_of(process)[-120:] for process in alive)
            self.broken.append(f"{END_SECONDS:.0f} s after kill -9 of the server there were still: {names}")

    def _count_restarts(self) -> None:
        workers = (self.server.get("/healthz") or {}).get("workers") or {}
        life = self.server.life
        life.restarts = sum(worker["restarts"] for worker in workers.values())
        if life.restarts > life.kills:
            self.broken.append(f"workers were restarted {life.restarts} times for {life.kills} kills")

    def count_last_restarts(self) -> None:
        """At the end: the restarts of the last life."""
        self._count_restarts()

    def _fill_disk(self) -> None:
        """No file that the server's main process writes may grow, until it has noticed and said so."""
        try:
            self.witnesses.unsaved_since = time.monotonic()
            self.server.limit_files(0)
        except (AttributeError, PermissionError, psutil.AccessDenied) as error:
            self.skipped["full disk"] = f"this system lets nobody limit another process's files ({error!r})"
            raise _MissedError from None
        try:
            if not self._until(lambda: "cannot be written" in str(self._problems()), FULL_SECONDS):
                self.broken.append(f"{FULL_SECONDS:.0f} s after the disk was full, /healthz did not say so")
            with contextlib.suppress(httpx.HTTPError):
                response = self.tally.call("POST", "/v1/streams", {"name": "unsaved", "source": "push"})
                if response is not None and response.status_code == 201:
                    self.broken.append("a stream was created that could not be saved")
        finally:
            self.server.limit_files(-1)
        if not self._until(lambda: "cannot be written" not in str(self._problems()), FULL_SECONDS):
            self.broken.append(f"{FULL_SECONDS:.0f} s after there was room again, /healthz still complained")
        self.witnesses.unsaved_since = None

    def _problems(self) -> list[str]:
        return list((self.server.get("/healthz") or {"problems": []})["problems"])

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.25)
        return False

    def _step_clock(self) -> None:
        self.server.clock.offset = self.rng.choice([step for step in CLOCK_STEPS if step != self.server.clock.offset])


class _MissedError(Exception):
    """There was nobody to hit."""
