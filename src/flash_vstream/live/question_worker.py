"""The question worker: a process that holds the language model and answers about shared states.

It never waits for a frame. While nobody asks, it reads the memory that was last asked about ahead of the next
question (the warm prefix), so that a question costs only its own tokens. Questions that come together are answered
in turns of one token each, so none waits for another's end. Whatever goes wrong with a question ends that question,
and so does the end of its time.
"""

import base64
import logging
import os
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
KEPT_STATES, KEPT_PREFIXES = 64, 4
DROP_SECONDS = 1.0
"""How often the states of streams that were removed are let go of."""
EVIDENCE_THUMBNAILS = 6
GRACE_SECONDS = 0.5
"""One frame that came so shortly before a question, or after it, may be missing from what was read ahead.

Where reading a memory takes as long as it stays the newest, a question would else wait for two readings.
"""
LOG_SECONDS = 10.0
"""How often at most an unexpected error is logged, so that callers cannot fill a disk."""
_ERROR_CHARACTERS = 500
log = logging.getLogger("flash_vstream.live")


@dataclass(frozen=True)
class Ask:
    """A question about the stream whose shared state is at ``shared_path`` (None: plain chat).

    ``asked_at`` is in monotonic seconds; the answer must have ended ``seconds`` later.
    """

    id: int
    shared_path: str | None
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    asked_at: float = field(default_factory=time.monotonic)
    seconds: float = 120.0
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
        self.active: dict[int, tuple[Ask, Iterator[tuple[str, Any]]]] = {}
        # By path: a stream's shared state, and when (monotonic seconds) it was asked about last.
        self.shared_states: OrderedDict[str, tuple[SharedTensors, float]] = OrderedDict()
        # By path: the frames in a memory and the prefix that was read of it.
        self.prefixes: OrderedDict[str, tuple[int, Prefix]] = OrderedDict()
        self._drop_at = self._log_at = 0.0

    def run(self) -> None:
        """Answer until the pipe closes or says that it is over."""
        try:
            while True:
                while self.pipe.poll(0 if self.active or self.waiting else IDLE_SECONDS):
                    order = self.pipe.recv()
                    if order is None:
                        return
                    self.take(order)
                if not self.step() and not self.waiting:
                    self.read_ahead()
                self.drop_removed()
        except (EOFError, OSError):
            pass  # whoever asks is gone

    def take(self, order: Ask | Cancel) -> None:
        """Take a question, or drop one."""
        if isinstance(order, Cancel):
            self.active.pop(order.id, None)
            self.waiting = deque(ask for ask in self.waiting if ask.id != order.id)
        else:
            self.waiting.append(order)

    def step(self) -> bool:
        """One token of every question under way; False when there are none."""
        for ask in [ask for ask in self.waiting if _is_over(ask)]:
            self.waiting.remove(ask)
            self.pipe.send((ask.id, "error", _over_message(ask)))
        while self.waiting and len(self.active) < AT_ONCE:
            ask = self.waiting.popleft()
            self.active[ask.id] = ask, self._answer(ask)
        for ask, answering in list(self.active.values()):
            kind, value = self._next_event(ask, answering)
            if kind != "text":
                del self.active[ask.id]
            self.pipe.send((ask.id, kind, value))
        return bool(self.active)

    def _next_event(self, ask: Ask, answering: Iterator[tuple[str, Any]]) -> tuple[str, Any]:
        """What comes next of an answer: a piece, the end, or what went wrong, whatever that is."""
        if _is_over(ask):
            return "error", _over_message(ask)
        try:
            return next(answering)
        except FileNotFoundError:
            return "error", "the stream is not watched any more"
        except (UserError, ValueError) as error:
            return "error", str(error)[:_ERROR_CHARACTERS]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            if time.monotonic() >= self._log_at:
                self._log_at = time.monotonic() + LOG_SECONDS
                log.warning("a question could not be answered", exc_info=error)
            reason = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
            return "error", f"the question could not be answered ({reason}); ask in other words"

    def _answer(self, ask: Ask) -> Iterator[tuple[str, Any]]:
        shared = self._shared(ask.shared_path) if ask.shared_path is not None else None
        prefix, warm = self._prefix(shared, ask.asked_at)
        answer = self.generator.ask(prefix, ask.question, ask.history, ask.max_new_tokens, ask.stop)
        first_token_seconds: float | None = None
        for piece in answer:
            if first_token_seconds is None:
                first_token_seconds = time.monotonic() - ask.asked_at
            yield "text", piece
        details = answer.to_dict() | {"warm": warm}
        details["first_token_seconds"] = first_token_seconds or time.monotonic() - ask.asked_at
        if shared is not None:
            _add_thumbnails(details["evidence"], shared)
        yield "done", details

    def _shared(self, path: str) -> SharedTensors:
        """The shared state at ``path``, which is read ahead from now on."""
        shared = self.shared_states[path][0] if path in self.shared_states else SharedTensors(path)
        self.shared_states[path] = (shared, time.monotonic())
        self.shared_states.move_to_end(path)
        while len(self.shared_states) > KEPT_STATES:
            self.shared_states.popitem(last=False)
        return shared

    def _prefix(self, shared: SharedTensors | None, asked_at: float) -> tuple[Prefix, bool]:
        """The memory of a stream as of a question, as the model has read it, and whether it was read ahead."""
        if shared is None:
            return self.generator.read(None), False
        warm = self._is_read(shared, time.monotonic() - asked_at + GRACE_SECONDS)
        return (self.prefixes[shared.path][1] if warm else self._read(shared)), warm

    def _is_read(self, shared: SharedTensors, tolerated: float = 0.0) -> bool:
        """Whether a stream's newest memory was read, or the one before a frame that came ``tolerated`` seconds ago."""
        if shared.path not in self.prefixes:
            return False
        read = self.prefixes[shared.path][0]
        frames, age = frames_seen(shared)
        return read == frames or (read == frames - 1 and age < tolerated)

    def _read(self, shared: SharedTensors) -> Prefix:
        snapshot = read_snapshot(shared, self.pipeline)
        if snapshot is None:
            raise UserError("the stream has not shown a frame yet; ask again in a moment")
        prefix = self.generator.read(snapshot)
        self.prefixes[shared.path] = (snapshot.frames, prefix)
        self.prefixes.move_to_end(shared.path)
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)
        return prefix

    def read_ahead(self) -> bool:
        """Read the stream that was asked about last, if it has moved on; False when it has not."""
        if not self.shared_states:
            return False
        path, (shared, asked_at) = next(reversed(self.shared_states.items()))
        if time.monotonic() - asked_at > WARM_SECONDS:
            return False
        try:
            if self._is_read(shared) or frames_seen(shared)[0] == 0:
                return False
            self._read(shared)
        except Exception as error:  # the next question about it says what is wrong
            log.warning("a memory could not be read ahead: %s: %s", type(error).__name__, error)
            self._drop(path)
            return False
        return True

    def drop_removed(self) -> None:
        """Let go of the memory of streams that were removed: mapped, it would stay."""
        now = time.monotonic()
        if now < self._drop_at:
            return
        self._drop_at = now + DROP_SECONDS
        for path in {*self.shared_states, *self.prefixes}:
            if not os.path.exists(path):
                self._drop(path)

    def _drop(self, path: str) -> None:
        self.shared_states.pop(path, None)
        self.prefixes.pop(path, None)


def _is_over(ask: Ask) -> bool:
    return time.monotonic() - ask.asked_at > ask.seconds


def _over_message(ask: Ask) -> str:
    return f"the answer took longer than the {ask.seconds:g} s that a question has; ask for less, or ask again later"


def _add_thumbnails(evidence: list[dict[str, Any]], shared: SharedTensors) -> None:
    """Put thumbnails (data URLs) to the slots that the answer looked at most."""
    pictures = read_thumbnails(shared)
    for slot in sorted(evidence, key=lambda slot: -(slot["share"] or 0))[:EVIDENCE_THUMBNAILS]:
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
    worker.pipeline.model.vision_tower = torch.nn.Identity()  # the frame worker has it
    orders.send(("ready", {}))
    worker.run()
