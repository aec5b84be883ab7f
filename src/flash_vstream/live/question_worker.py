"""The question worker: a process that holds the language model and answers about shared states.

It never waits for a frame. While nobody asks, it reads the memory that was last asked about ahead
of the next question (the warm prefix), so that a question costs only its own tokens. Questions that
come together are answered in turns of one token each, so none waits for another's end.
"""

import base64
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from flash_vstream.errors import UserError
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import frames_seen, read_thumbnails
from flash_vstream.live.streams import read_snapshot
from flash_vstream.models.generation import MAX_NEW_TOKENS, Prefix
from flash_vstream.pipeline import FlashVStream

IDLE_SECONDS = 0.02
WARM_SECONDS = 300.0
"""How long after its last question a stream is read ahead."""
AT_ONCE = 32
"""Questions that are answered in turns; more wait for a place."""
KEPT_BOARDS, KEPT_PREFIXES = 64, 4
SHOWN_THUMBNAILS = 6
GRACE_SECONDS = 0.5
"""One frame that came so shortly before a question, or after it, may be missing from what was read ahead.

Where reading a memory takes as long as it stays the newest, a question would else wait for two readings.
"""


@dataclass(frozen=True)
class Ask:
    """A question about the stream whose shared state is at ``shared`` (None: plain chat)."""

    id: int
    shared: str | None
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    asked: float = field(default_factory=time.monotonic)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for the answer any more."""

    id: int


class QuestionWorker:
    """The question worker's state: the model, what was read ahead, questions under way."""

    def __init__(self, pipeline: FlashVStream, pipe: Connection):
        self.pipeline, self.pipe = pipeline, pipe
        self.generator = pipeline.generator  # made now, not while the first question waits
        self.waiting: deque[Ask] = deque()
        self.active: dict[int, Iterator[None]] = {}
        self.shared_states: OrderedDict[str, tuple[SharedTensors, float]] = OrderedDict()
        self.prefixes: OrderedDict[str, tuple[int, Prefix]] = OrderedDict()

    def take(self, order: Ask | Cancel) -> None:
        if isinstance(order, Cancel):
            self.active.pop(order.id, None)
            self.waiting = deque(ask for ask in self.waiting if ask.id != order.id)
        else:
            self.waiting.append(order)

    def step(self) -> bool:
        """One token of every question under way; False when there are none."""
        while self.waiting and len(self.active) < AT_ONCE:
            ask = self.waiting.popleft()
            self.active[ask.id] = self._answer(ask)
        for number, answering in list(self.active.items()):
            try:
                next(answering)
            except StopIteration:
                del self.active[number]
            except FileNotFoundError:
                del self.active[number]
                self.pipe.send((number, "error", "the stream is not watched any more"))
            except (UserError, ValueError) as error:
                del self.active[number]
                self.pipe.send((number, "error", str(error)))
        return bool(self.active)

    def _answer(self, ask: Ask) -> Iterator[None]:
        prefix, warm = self._prefix(ask.shared, ask.asked)
        answer = self.generator.ask(prefix, ask.question, ask.history, ask.max_new_tokens, ask.stop)
        first: float | None = None
        for piece in answer:
            first = time.monotonic() - ask.asked if first is None else first
            self.pipe.send((ask.id, "text", piece))
            yield
        told = answer.to_dict() | {"warm": warm}
        told["first_token_seconds"] = first if first is not None else time.monotonic() - ask.asked
        if ask.shared is not None:
            _picture_evidence(told["evidence"], self.shared_states[ask.shared][0])
        self.pipe.send((ask.id, "done", told))

    def _prefix(self, path: str | None, asked: float) -> tuple[Prefix, bool]:
        """The memory of a stream as of a question, as the model has read it, and whether it was read ahead."""
        if path is None:
            return self.generator.read(None), False
        shared = self.shared_states[path][0] if path in self.shared_states else SharedTensors(path)
        warm = self._is_read(path, shared, time.monotonic() - asked + GRACE_SECONDS)
        prefix = self.prefixes[path][1] if warm else self._read(path, shared)
        self.shared_states[path] = (shared, time.monotonic())  # from now on it is read ahead
        self.shared_states.move_to_end(path)
        while len(self.shared_states) > KEPT_BOARDS:
            self.shared_states.popitem(last=False)
        return prefix, warm

    def _is_read(self, path: str, shared: SharedTensors, tolerated: float = 0.0) -> bool:
        """Whether a stream's newest memory was read, or the one before a frame that came ``tolerated`` seconds ago."""
        if path not in self.prefixes:
            return False
        read = self.prefixes[path][0]
        frames, age = frames_seen(shared)
        return read == frames or (read == frames - 1 and age < tolerated)

    def _read(self, path: str, shared: SharedTensors) -> Prefix:
        snapshot = read_snapshot(shared, self.pipeline)
        if snapshot is None:
            raise UserError("the stream has not shown a frame yet; ask again in a moment")
        prefix = self.generator.read(snapshot)
        self.prefixes[path] = (snapshot.frames, prefix)
        self.prefixes.move_to_end(path)
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)
        return prefix

    def read_ahead(self) -> bool:
        """Read the stream that was asked about last, if it has moved on; False when it has not."""
        if not self.shared_states:
            return False
        path, (shared, asked) = next(reversed(self.shared_states.items()))
        if time.monotonic() - asked > WARM_SECONDS:
            return False
        if self._is_read(path, shared):
            return False
        self._read(path, shared)
        return True


def _picture_evidence(evidence: list[dict[str, Any]], shared: SharedTensors) -> None:
    """Put thumbnails (data URLs) to the slots that the answer looked at most."""
    pictures = read_thumbnails(shared)
    for slot in sorted(evidence, key=lambda slot: -(slot["share"] or 0))[:SHOWN_THUMBNAILS]:
        if data := pictures.get(slot["exemplar"]):
            slot["thumbnail"] = "data:image/jpeg;base64," + base64.b64encode(data).decode()


def run_question_worker(model: str, orders: Connection) -> None:
    """The process's main function: say ``("ready", info)``, then answer until the pipe closes."""
    from flash_vstream.models.hub import silence_transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence_transformers()
    try:
        worker = QuestionWorker(FlashVStream.from_pretrained(model), orders)
    except UserError as error:
        orders.send(str(error))
        return
    worker.pipeline.model.vision_tower = torch.nn.Identity()  # it is for the frame worker to see
    orders.send(("ready", {}))
    try:
        while True:
            while orders.poll(0 if worker.active or worker.waiting else IDLE_SECONDS):
                order = orders.recv()
                if order is None:
                    return
                worker.take(order)
            if not worker.step() and not worker.waiting:
                worker.read_ahead()
    except (EOFError, OSError):
        pass  # whoever asks is gone
