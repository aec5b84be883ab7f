"""The frame handler: a process that reads sources, encodes frames and writes memories.

It never waits for a question. It shares each stream's memory through a ``StateBoard`` and takes
orders through a pipe, so whoever asks the questions can live anywhere that reads the same board.
"""

import os
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from flash_vstream.errors import UserError
from flash_vstream.memory import StarMemory
from flash_vstream.stream.board import StateBoard
from flash_vstream.video.process import SourceReader, wait_for_any
from flash_vstream.video.sources import Source

IDLE_SECONDS = 0.05
NOTES_SECONDS = 0.5
"""How often a stream's status is published while no frame comes."""


@dataclass(frozen=True)
class Add:
    """Watch ``source`` as the stream ``name``, publishing to the board at ``board``."""

    name: str
    source: Source
    board: str


@dataclass(frozen=True)
class Remove:
    """Stop watching the stream ``name``."""

    name: str


class _Watched:
    """One stream in the frame handler: its reader, its memory, its board."""

    def __init__(self, order: Add, memory: StarMemory):
        self.reader = SourceReader(order.source, os.path.dirname(order.board))
        self.memory = memory
        self.board = StateBoard(order.board, memory.state_dict())
        self.offset = 0.0
        self.kept = 0
        self.published = 0.0
        self.clock = 0.0
        known = self.board.read()
        if known is not None:  # a handler before this one got so far
            state, notes = known
            memory.load_state_dict(state)
            self.kept = notes["kept"]
            if memory.frames:
                gap = max(0.0, time.time() - notes["clock"]) if notes["clock"] else 0.0
                self.offset = memory.read().time + gap

    def publish(self, encode_seconds: float | None = None) -> None:
        now = time.time()
        notes: dict[str, Any] = {**asdict(self.reader.status), "kept": self.kept, "clock": self.clock}
        notes["encode_seconds"] = encode_seconds
        self.board.publish(self.memory.state_dict(), notes)
        self.published = now


def run_frame_handler(model: str, orders: Connection) -> None:
    """The process's main function: say ``"ready"``, then watch until the pipe closes."""
    from flash_vstream.models.zoo import quiet
    from flash_vstream.stream.api import FlashVStream

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the orders
    quiet()
    try:
        eyes = FlashVStream.from_pretrained(model)
    except UserError as error:
        orders.send(str(error))
        return
    eyes.network.language_model = torch.nn.Identity()  # it is for the question handler to speak
    streams: dict[str, _Watched] = {}
    orders.send("ready")
    try:
        while _obey(orders, streams, eyes):
            if not _look(streams, eyes):
                wait_for_any([watched.reader for watched in streams.values()], IDLE_SECONDS)
    except (EOFError, OSError):
        pass  # whoever gave the orders is gone
    finally:
        for watched in streams.values():
            watched.reader.close()


def _obey(orders: Connection, streams: dict[str, _Watched], eyes: Any) -> bool:
    """Carry out the orders that wait; False when there will be no more."""
    while orders.poll():
        order = orders.recv()
        if isinstance(order, Add):
            streams[order.name] = _Watched(order, eyes.new_stream().memory)
        elif isinstance(order, Remove) and order.name in streams:
            streams.pop(order.name).reader.close()
            orders.send(order.name)
        elif order is None:
            return False
    return True


def _look(streams: dict[str, _Watched], eyes: Any) -> bool:
    """Encode the newest frame of each stream in one batch and write the memories."""
    fresh = [(watched, frame) for watched in streams.values() if (frame := watched.reader.newest()) is not None]
    now = time.time()
    for watched in streams.values():
        if now - watched.published > NOTES_SECONDS:
            watched.publish()
    if not fresh:
        return False
    begun = time.perf_counter()
    features = eyes.encode([frame.image for _, frame in fresh])
    taken = (time.perf_counter() - begun) / len(fresh)
    for (watched, frame), feature in zip(fresh, features, strict=True):
        watched.memory.write(feature[None], [frame.time + watched.offset])
        watched.kept += 1
        watched.clock = now
        watched.publish(taken)
    return True
