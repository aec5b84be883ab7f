"""Witness streams of ``bench chaos``: watched from the first moment to the last, while everything else is disturbed.

A witness's status tells how many frames it has kept and how old the newest is. From that follows how long it was
without frames, whatever the delay of the request.
"""

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import httpx

from flash_vstream.bench.chaos_server import ServerUnderTest

POLL_SECONDS = 0.25
SAVE_SECONDS = 10.0
"""How often the server saves memories."""
RECENT_SECONDS = 120.0


@dataclass(frozen=True)
class Gap:
    """A time without frames (monotonic seconds), and its length as certain as requests can tell."""

    start: float
    end: float
    seconds: float


@dataclass
class Witness:
    """A stream that must go on: what was seen of it."""

    name: str
    fps: float
    frames: int = 0
    """Kept since the benchmark began, over all of the server's lives."""
    kept: int = 0
    time: float = -1.0
    arrived: float = 0.0
    """When the newest frame was written, in monotonic seconds."""
    life: int = 0
    gaps: list[Gap] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """When it had kept how many frames, in this life and the one before."""

    def see(self, status: dict[str, Any], now: float, life: int, kept_at_least: int) -> None:
        """Take in a status; ``kept_at_least`` is how many frames a new life of the server must remember."""
        if status["time"] is None or status["lag"] is None:
            return
        kept, arrived = status["kept"], now - status["lag"]
        if life != self.life:
            if kept < kept_at_least:
                self.broken.append(f"{self.name} had {kept} frames after a restart; {kept_at_least} had been saved")
            self.life, self.kept = life, min(self.kept, kept)
        elif kept < self.kept or status["time"] < self.time - 1e-6:
            before, after = f"{self.kept} at {self.time:.3f} s", f"{kept} at {status['time']:.3f} s"
            self.broken.append(f"{self.name} went back, from frame {before} to {after}")
        if kept > self.kept:
            if self.arrived:
                # Frames come at most at ``fps``, so those between the first and the last took at least this long.
                known = (kept - self.kept - 1) / self.fps
                self.gaps.append(Gap(self.arrived, arrived, max(0.0, arrived - self.arrived - known)))
            self.frames += kept - self.kept
            self.arrived = max(self.arrived, arrived)
        self.kept, self.time = kept, status["time"]
        self.recent.append((now, kept))
        while self.recent[0][0] < now - RECENT_SECONDS:
            self.recent.popleft()

    def kept_before(self, moment: float) -> int:
        """How many frames it had kept at ``moment`` (monotonic seconds); 0 if that is unknown."""
        return max((kept for at, kept in self.recent if at <= moment), default=0)


class Witnesses:
    """Polls the witnesses' statuses in a thread of its own, and times the requests."""

    def __init__(self, server: ServerUnderTest, rates: dict[str, float]):
        self._server = server
        self.streams = {name: Witness(name, fps) for name, fps in rates.items()}
        self.status_seconds: list[float] = []
        self.broken: list[str] = []
        self.unsaved_since: float | None = None
        """Since when (monotonic seconds) the state folder could not be written."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witnesses", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. The time since the newest frame counts as a gap too."""
        self._over.set()
        self._thread.join()
        now = time.monotonic()
        for witness in self.streams.values():
            witness.gaps.append(Gap(witness.arrived, now, now - witness.arrived))

    def all_since(self, moment: float) -> bool:
        """Whether every witness has a frame newer than ``moment`` (monotonic seconds)."""
        return all(witness.arrived > moment for witness in self.streams.values())

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            life, started = self._server.life, time.monotonic()
            try:
                statuses = self._server.call("GET", "/v1/streams", timeout=30).json()
            except (httpx.HTTPError, ValueError) as error:
                if not self._server.was_down(started) and not self._over.is_set():
                    self.broken.append(f"GET /v1/streams was lost: {error!r}")
                continue
            now = time.monotonic()
            self.status_seconds.append(now - started)
            if life is not self._server.life:
                continue
            for status in statuses:
                if (witness := self.streams.get(status["name"])) is not None:
                    witness.see(status, now, len(self._server.lives), self._must_remember(witness))

    def _must_remember(self, witness: Witness) -> int:
        """How many frames of a witness the life before had certainly saved."""
        lives = self._server.lives
        if len(lives) < 2 or lives[-2].ended is None:
            return 0
        begun = lives[-2].listening or lives[-2].ended
        saved = min(lives[-2].ended, self.unsaved_since or lives[-2].ended) - 2 * SAVE_SECONDS
        return witness.kept_before(saved) if saved > begun else 0

    def check_memories(self) -> None:
        """Every witness's memory begins at 0 and weighs as much as the frames that it was given."""
        for name, witness in self.streams.items():
            memory = None
            with contextlib.suppress(httpx.HTTPError, ValueError):
                response = self._server.call("GET", f"/v1/streams/{name}/memory")
                memory = response.json() if response.status_code == 200 else None
            if memory is None:
                continue  # the server is away, or this is its first moment; the gaps tell
            weight = sum(slot["weight"] for slot in memory["slots"] if slot["part"] == "temporal")
            if abs(weight - memory["frames"]) > 1e-3 * memory["frames"]:
                witness.broken.append(f"{name}'s memory weighs {weight:g} frames of {memory['frames']}")
            if min(slot["start"] for slot in memory["slots"]) != 0:
                witness.broken.append(f"{name}'s memory does not begin at 0")
