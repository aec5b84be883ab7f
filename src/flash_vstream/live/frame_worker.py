"""The frame worker: a process that reads sources, encodes frames and writes memories.

It never waits for a question. It shares what each stream has come to through a ``SharedTensors`` and
takes orders through a pipe, so whoever asks the questions can live anywhere that can read the shared states.
"""

import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flash_vstream.errors import UserError
from flash_vstream.live.shared_tensors import SharedTensors
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
from flash_vstream.video.capture import RESUME_AFTER, PushReader, SourceReader, wait_for_any
from flash_vstream.video.sources import Source

IDLE_SECONDS = 0.02
NOTES_SECONDS = 0.5
"""How often a stream's status is published while no frame comes."""


@dataclass(frozen=True)
class Add:
    """Watch ``source`` as the stream ``name``, publishing to the shared state at ``shared``.

    ``saved`` is a file that an earlier state was saved to. A pushed source has its ring at ``ring``.
    """

    name: str
    source: Source
    shared: str
    saved: str | None = None
    ring: str | None = None


@dataclass(frozen=True)
class Remove:
    """Stop watching the stream ``name``."""

    name: str


class WatchedStream:
    """One stream in the frame worker: its reader, its memory, its pictures, its shared state."""

    def __init__(self, order: Add, memory: StarMemory):
        self.memory = memory
        self.pictures = Pictures(max_slots(memory))
        self.slots = empty_slots(memory)
        self.shared = SharedTensors.create(order.shared, stream_state(memory, self.slots, self.pictures))
        self.notes: dict[str, Any] = {"came": 0, "kept": 0, "skipped": 0, "gaps": []}
        self.notes |= {"clock": None, "position": 0.0, "encode_seconds": None}
        self.published = 0.0
        self.offset = 0.0
        source, origin = self._resume(order)
        self.reader = (
            PushReader(order.ring, source.size, origin)
            if order.ring is not None
            else SourceReader(source, os.path.dirname(order.shared))
        )
        self.reader.status.came, self.reader.status.skipped = self.notes["came"], self.notes["skipped"]

    def _resume(self, order: Add) -> tuple[Source, float | None]:
        """Go on from what was shared, or from what was saved of an earlier one."""
        known = self.shared.read()
        if known is None and order.saved is not None and Path(order.saved).exists():
            known = self._load(Path(order.saved))
        if known is None:
            return order.source, None
        state, notes = known
        self.memory.load_state_dict(memory_state(state))
        self.pictures.load_state_dict(state)
        self.notes |= {name: notes[name] for name in self.notes if name in notes}
        self.slots = state["slots"]
        if not self.memory.frames:
            return order.source, None
        newest = self.memory.read().time
        if order.source.resumes:
            self.offset = newest - self.notes["position"]
            return replace(order.source, begin=self.notes["position"] + RESUME_AFTER), None
        gap = max(0.0, time.time() - self.notes["clock"])
        self.notes["gaps"] = [*self.notes["gaps"][-19:], [newest, newest + gap]]
        if order.ring is not None:
            return order.source, self.notes["clock"] - newest
        self.offset = newest + gap
        return order.source, None

    def _load(self, saved: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was saved; a file that is damaged or of another model is set aside, never written over."""
        try:
            state, notes = load_state(saved)
            self.memory.load_state_dict(memory_state(state))
            self.pictures.load_state_dict(state)
        except (SafetensorError, ValueError, KeyError, RuntimeError, OSError, TypeError):
            saved.replace(saved.with_suffix(".set-aside"))
            return None
        return state, notes

    def write(self, feature: torch.Tensor, image: Any, moment: float, encode_seconds: float) -> None:
        """Write a frame and publish what the stream has come to."""
        begun = time.perf_counter()
        moment += self.offset
        self.memory.write(feature[None], [moment])
        snapshot = self.memory.read()
        self.slots = slot_table(snapshot, max_slots(self.memory))
        wanted = {time for _, slots in snapshot.parts() for time in slots.exemplar.tolist()}
        self.pictures.see(moment, image, wanted)
        self.notes |= {"kept": self.notes["kept"] + 1, "clock": time.time(), "position": self.reader.position}
        self.notes |= {"encode_seconds": encode_seconds, "write_seconds": time.perf_counter() - begun}
        self.publish()

    def publish(self) -> None:
        """Publish the stream as it is now."""
        state = stream_state(self.memory, self.slots, self.pictures)
        self.shared.publish(state, {**self.notes, **asdict(self.reader.status)})
        self.published = time.time()


def run_frame_worker(model: str, orders: Connection) -> None:
    """The process's main function: say ``("ready", info)``, then watch until the pipe closes.

    ``info`` tells the side in pixels that frames must have, and what a memory holds (``memory_capacity``).
    """
    from flash_vstream.models.hub import silence_transformers
    from flash_vstream.pipeline import FlashVStream

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the orders
    silence_transformers()
    # Half of the cores: with as many threads as the question worker has, each waits for the other's.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    try:
        pipeline = FlashVStream.from_pretrained(model)
    except UserError as error:
        orders.send(str(error))
        return
    memory = pipeline.new_stream().memory
    if not isinstance(memory, StarMemory):
        orders.send("live streams need a memory of constant size; compat='release' has none")
        return
    pipeline.model.language_model = torch.nn.Identity()  # it is for the question worker to speak
    streams: dict[str, WatchedStream] = {}
    size = pipeline.processor.image_processor.size
    orders.send(("ready", {"size": size, "memory": memory_capacity(memory)}))
    try:
        while _obey(orders, streams, pipeline):
            if not _look(streams, pipeline):
                wait_for_any([watched.reader for watched in streams.values()], IDLE_SECONDS)
    except (EOFError, OSError):
        pass  # whoever gave the orders is gone
    finally:
        for watched in streams.values():
            watched.reader.close()


def _obey(orders: Connection, streams: dict[str, WatchedStream], pipeline: Any) -> bool:
    """Carry out the orders that wait; False when there will be no more."""
    while orders.poll():
        order = orders.recv()
        if isinstance(order, Add):
            streams[order.name] = WatchedStream(order, pipeline.new_stream().memory)
        elif isinstance(order, Remove) and order.name in streams:
            streams.pop(order.name).reader.close()
            orders.send(order.name)
        elif order is None:
            return False
    return True


def _look(streams: dict[str, WatchedStream], pipeline: Any) -> bool:
    """Encode the newest frame of each stream in one batch and write the memories."""
    fresh = [(watched, frame) for watched in streams.values() if (frame := watched.reader.newest()) is not None]
    now = time.time()
    for watched in streams.values():
        if now - watched.published > NOTES_SECONDS:
            watched.publish()
    if not fresh:
        return False
    begun = time.perf_counter()
    features = pipeline.encode([frame.image for _, frame in fresh])
    taken = (time.perf_counter() - begun) / len(fresh)
    for (watched, frame), feature in zip(fresh, features, strict=True):
        watched.write(feature, frame.image, frame.time, taken)
    return True
