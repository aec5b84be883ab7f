"""The frame worker: a process that reads sources, encodes frames and writes memories.

It never waits for a question. It publishes each stream's state through ``SharedTensors`` and takes orders through a
pipe, so questions can be answered by any process that can read the shared states.

An exception in a stream stops only that stream. Its status becomes failed, and it restarts from its last published
state after a delay that grows with each failure.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flash_vstream.backoff import backoff_seconds
from flash_vstream.errors import UserError
from flash_vstream.files import set_aside
from flash_vstream.live.messages import Add, Remove
from flash_vstream.live.shared_tensors import Layout, SharedTensors, layout_of
from flash_vstream.live.stream_state import (
    Pictures,
    empty_slots,
    load_state,
    max_slots,
    memory_capacity,
    memory_state,
    slot_table,
    stream_state,
)
from flash_vstream.memory import StarMemory
from flash_vstream.memory.frames import FrameMemory
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.interface import Memory
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import Frame
from flash_vstream.video.capture import RESUME_AFTER, Capture, PushedFrames, SourceStatus, wait_for_any

IDLE_SECONDS = 0.02
STATUS_SECONDS = 0.5
"""How often a stream's status is published while no frames arrive."""
RETRY_SECONDS = (1.0, 60.0)
"""The shortest and longest delay before a failed stream restarts; the delay doubles each time, with jitter."""
GAPS_KEPT = 20
log = logging.getLogger("flash_vstream.live")


@dataclass(frozen=True)
class Failure:
    """Why a stream failed, how many times in a row, and when (monotonic seconds) it restarts."""

    error: str
    count: int
    retry_at: float


class WatchedStream:
    """One stream in the frame worker: its reader, memory, pictures and shared state."""

    def __init__(self, order: Add, memory: Memory, failure: Failure | None = None):
        """Start or resume the stream in ``order``; raises whatever its source or its saved memory raises.

        ``failure`` is what stopped the stream last time. The status shows it until the next frame is written.
        """
        self.order = order
        self.memory = memory
        self.failure = failure
        self.pictures = Pictures.of(memory)
        self.slots = empty_slots(memory)
        self.shared = SharedTensors(order.shared_path)
        self.notes: dict[str, Any] = {"came": 0, "kept": 0, "skipped": 0, "gaps": [], "position": None}
        # When the newest frame was written, by the wall clock and by the monotonic clock, which cannot be set.
        self.notes |= {"time": None, "clock": None, "monotonic": None, "encode_seconds": None, "write_seconds": None}
        self.status_due = 0.0
        self.reader = self._reader()
        self.reader.status.came, self.reader.status.skipped = self.notes["came"], self.notes["skipped"]
        self.reader.status.restarts = failure.count if failure is not None else 0
        if self.memory.frames and not self.shared.version:
            self.publish_status()
            self._publish()  # what was saved can be asked about even if no frame comes any more

    def _reader(self) -> "Capture | PushedFrames | EndedReader":
        """The source's reader, resuming from the published state or from one saved by an earlier run."""
        source, ring = self.order.source, self.order.ring
        restored = self._restore()
        start: float | None = None
        if restored is not None:
            state, notes, seconds_ago = restored
            self.notes |= {name: notes[name] for name in self.notes if name in notes}
            self.slots = state["slots"]
            self.notes["time"] = self.memory.time
            self.notes["monotonic"] = time.monotonic() - seconds_ago if self.memory.frames else None
            if notes.get("state") == "ended":
                return EndedReader(notes.get("error"))  # its file may have been deleted
        if restored is not None and self.memory.frames:
            newest = self.notes["time"]
            if source.can_resume and self.notes["position"] is not None:
                source = replace(source, begin=self.notes["position"] + RESUME_AFTER)
                start = newest + RESUME_AFTER
            else:
                start = newest + seconds_ago
                self.notes["gaps"] = [*self.notes["gaps"], [newest, start]][-GAPS_KEPT:]
        if ring is not None:
            return PushedFrames(ring, source.size, source.fps, start)
        return Capture(source, os.path.dirname(self.order.shared_path), start)

    def _restore(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], float] | None:
        """Restore memory and pictures from the published or saved state; returns state, notes and age in seconds.

        Returns None when there is neither. Ages are measured by the monotonic clock within a run, and between runs by
        the wall clock, which may have been changed.
        """
        published = self.shared.read()
        if published is not None:
            state, notes = published
            self.memory.load_state_dict(memory_state(state))
            self.pictures.load_state_dict(state)
            notes = {**(self.shared.read_status() or {}), **notes}
            return state, notes, time.monotonic() - (notes["monotonic"] or time.monotonic())
        if self.order.saved is not None and os.path.exists(self.order.saved):
            state, notes = self._load(Path(self.order.saved))
            return state, notes, max(0.0, time.time() - (notes["clock"] or time.time()))
        return None

    def _load(self, saved: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Load a saved state and restore memory and pictures from it.

        A file that is damaged or belongs to another model is renamed, never overwritten, and ``UserError`` says so.
        The stream then restarts without it.
        """
        try:
            state, notes = load_state(saved)
            if missing := {"slots"} - state.keys() | {"clock", "position"} - notes.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            self.memory.load_state_dict(memory_state(state))
            self.pictures.load_state_dict(state)
        except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
            aside = set_aside(saved)
            raise UserError(f"the saved memory cannot be used and is set aside as {aside} ({error})") from None
        return state, notes

    def write(self, feature: torch.Tensor, frame: Frame, encode_seconds: float) -> None:
        """Write a frame to the memory and publish the stream's new state."""
        started = time.perf_counter()
        self.memory.write(feature[None], [frame.time])
        snapshot = self.memory.read()
        self.slots = slot_table(snapshot, max_slots(self.memory))
        wanted = {time for _, slots in snapshot.parts() for time in slots.exemplar.tolist()}
        self.pictures.see(frame, wanted, snapshot.longterm.exemplar.tolist())
        self.notes |= {"came": self.reader.status.came, "skipped": self.reader.status.skipped}
        self.notes |= {"kept": self.notes["kept"] + 1, "position": self.reader.position}
        self.notes |= {"time": frame.time, "clock": time.time(), "monotonic": time.monotonic()}
        self.notes |= {"encode_seconds": encode_seconds, "write_seconds": time.perf_counter() - started}
        self._publish()
        self.failure = None
        self.publish_status()

    def _publish(self) -> None:
        """Publish memory, slots and pictures."""
        self.shared.publish(stream_state(self.memory, self.slots, self.pictures), self.notes)

    def publish_status(self) -> None:
        """Publish the stream's status."""
        status = asdict(self.reader.status)
        if self.failure is not None and status["state"] == "starting":
            status |= {"state": "failed", "error": self.failure.error}
        self.shared.publish_status({**self.notes, **status})
        self.status_due = time.monotonic() + STATUS_SECONDS


class EndedReader:
    """Stands in for the reader of a file that had ended before the frame worker restarted."""

    position = None

    def __init__(self, error: str | None):
        self.status = SourceStatus(state="ended", error=error)

    def newest(self) -> Frame | None:
        """Always None: the file has ended."""
        return None

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class FrameWorker:
    """The frame worker's loop: take orders, collect every stream's newest frame, encode one batch, write memories."""

    def __init__(self, pipeline: FlashVStream, orders: Connection):
        self.pipeline, self.orders = pipeline, orders
        self.added: dict[str, Add] = {}
        self.watched: dict[str, WatchedStream] = {}
        self.failures: dict[str, Failure] = {}

    def run(self) -> None:
        """Watch until the pipe closes or delivers None."""
        try:
            while self.step():
                pass
        finally:
            for name in list(self.watched):
                self._end(name)

    def step(self) -> bool:
        """Carry out pending orders and process new frames; False when it is time to stop."""
        try:
            while self.orders.poll():
                order = self.orders.recv()
                if order is None:
                    return False
                self._obey(order)
        except (EOFError, OSError):
            return False  # the parent is gone
        self._retry()
        fresh = self._newest_frames()
        for name, frame, feature, seconds in self._encoded(fresh):
            with self._alone(name):
                self.watched[name].write(feature, frame, seconds)
        if not fresh:
            self._wait()
        return True

    def _obey(self, order: Add | Remove) -> None:
        if isinstance(order, Add):
            self.added[order.name] = order
            self._begin(order.name)
        elif order.name in self.added:
            self._end(order.name)
            self.failures.pop(order.name, None)
            self.orders.send(self.added.pop(order.name).shared_path)

    def _begin(self, name: str) -> None:
        with self._alone(name):
            memory = self.pipeline.new_memory()
            self.watched[name] = WatchedStream(self.added[name], memory, self.failures.get(name))
            self.watched[name].publish_status()

    def _end(self, name: str) -> None:
        watched = self.watched.pop(name, None)
        if watched is not None:
            try:
                watched.reader.close()
            except Exception as error:
                log.warning("the reader of %r did not close: %s", name, error)

    def _retry(self) -> None:
        now = time.monotonic()
        for name, failure in list(self.failures.items()):
            if name not in self.watched and now >= failure.retry_at:
                self._begin(name)
            elif name in self.watched and now > failure.retry_at + RETRY_SECONDS[1]:
                del self.failures[name]  # it has run well for long enough

    def _newest_frames(self) -> list[tuple[str, Frame]]:
        fresh = []
        for name, watched in list(self.watched.items()):
            with self._alone(name):
                if (frame := watched.reader.newest()) is not None:
                    fresh.append((name, frame))
                elif time.monotonic() > watched.status_due:
                    watched.publish_status()
        return fresh

    def _encoded(self, fresh: list[tuple[str, Frame]]) -> Iterator[tuple[str, Frame, torch.Tensor, float]]:
        """Each frame with its features and its share of the encoding seconds, encoded as one batch.

        If the batch fails, frames are encoded one by one, so that only the faulty one fails.
        """
        if not fresh:
            return
        started = time.perf_counter()
        try:
            features = self.pipeline.encode([frame.image for _, frame in fresh])
        except Exception as error:
            log.warning("a batch of %d frames could not be encoded: %s", len(fresh), _reason(error))
        else:
            seconds = (time.perf_counter() - started) / len(fresh)
            yield from ((name, frame, feature, seconds) for (name, frame), feature in zip(fresh, features, strict=True))
            return
        for name, frame in fresh:
            started, feature = time.perf_counter(), None
            with self._alone(name):
                feature = self.pipeline.encode([frame.image])[0]
            if feature is not None:
                yield name, frame, feature, time.perf_counter() - started

    def _wait(self) -> None:
        readers = [watched.reader for watched in self.watched.values()]
        try:
            wait_for_any([reader for reader in readers if not isinstance(reader, EndedReader)], IDLE_SECONDS)
        except (OSError, ValueError):  # a descriptor has just closed; its reader reports why
            time.sleep(IDLE_SECONDS)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Context in which any exception fails the stream ``name`` and no other."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # panics in tokenizers or safetensors are not Exceptions
            self._fail(name, error)

    def _fail(self, name: str, error: BaseException) -> None:
        """Stop a stream, publish the reason, and schedule its restart."""
        count = self.failures[name].count if name in self.failures else 0
        wait = backoff_seconds(count + 1, *RETRY_SECONDS)
        failure = Failure(_reason(error), count + 1, time.monotonic() + wait)
        expected = isinstance(error, UserError | OSError)
        log.warning(
            "stream %r failed and restarts in %.0f s: %s", name, wait, failure.error[:500],
            exc_info=None if expected else error,
        )  # fmt: skip
        self._end(name)
        self.failures[name] = failure
        try:
            shared = SharedTensors(self.added[name].shared_path)
            status = shared.read_status() or {}
            shared.publish_status({**status, "state": "failed", "error": failure.error, "restarts": failure.count})
        except Exception as lost:
            log.warning("the status of %r cannot be published: %s", name, lost)


def _reason(error: BaseException) -> str:
    """An error's message, preceded by its type unless it is a ``UserError``."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def run_frame_worker(model: str | ModelChoice, orders: Connection) -> None:
    """The process's main function: send ``("ready", info)``, then watch until the pipe closes.

    ``info`` holds the frames' side in pixels (``size``), the layout of a stream's shared state (``layout``), and a
    memory's capacity (``memory``, see ``memory_capacity``). If the worker cannot start, it sends the reason instead.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # Half the cores: with as many threads as the question worker, the two would wait for each other's threads.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    try:
        pipeline = FlashVStream.for_answers(model)
    except UserError as error:
        orders.send(str(error))
        return
    memory = pipeline.new_stream().memory
    if not isinstance(memory, StarMemory | FrameMemory) or (isinstance(memory, FrameMemory) and memory.grows):
        orders.send("live streams need a memory of constant size; compat='release' and --memory all have none")
        return
    pipeline.model.drop_language()  # the question worker has it
    size, layout = pipeline.processor.image_processor.size, state_layout(memory)
    orders.send(("ready", {"size": size, "layout": layout, "memory": memory_capacity(memory)}))
    FrameWorker(pipeline, orders).run()


def state_layout(memory: Memory) -> Layout:
    """The layout of a stream's shared state, for a memory like ``memory``."""
    return layout_of(stream_state(memory, empty_slots(memory), Pictures.of(memory)))
