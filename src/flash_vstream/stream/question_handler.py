"""The question handler: a process that holds the language model and answers about boards.

It never waits for a frame. While nobody asks, it reads the memory that was last asked about ahead
of the next question (the warm prefix), so that a question costs only its own tokens. Questions that
come together are answered in turns of one token each, so none waits for another's end.
"""

import base64
import contextlib
import queue
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from flash_vstream.errors import UserError
from flash_vstream.models.answering import MAX_NEW_TOKENS, Prefix
from flash_vstream.stream.api import FlashVStream
from flash_vstream.stream.board import StateBoard
from flash_vstream.stream.live import view_on
from flash_vstream.stream.published import frames_seen, thumbnails_on
from flash_vstream.stream.supervision import Supervised

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
    """A question about the stream on ``board`` (None: plain chat)."""

    id: int
    board: str | None
    question: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    asked: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for the answer any more."""

    id: int


class Mind:
    """The question handler's state: the model, what was read ahead, questions under way."""

    def __init__(self, model: FlashVStream, pipe: Connection):
        self.model, self.pipe = model, pipe
        self.answerer = model.answerer  # made now, not while the first question waits
        self.waiting: deque[Ask] = deque()
        self.active: dict[int, Iterator[None]] = {}
        self.boards: OrderedDict[str, tuple[StateBoard, float]] = OrderedDict()
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
        prefix, warm = self._prefix(ask.board, ask.asked)
        answer = self.answerer.ask(prefix, ask.question, ask.history, ask.max_new_tokens)
        first: float | None = None
        for piece in answer:
            first = time.monotonic() - ask.asked if first is None else first
            self.pipe.send((ask.id, "text", piece))
            yield
        told = answer.to_dict() | {"warm": warm}
        told["first_token_seconds"] = first if first is not None else time.monotonic() - ask.asked
        if ask.board is not None:
            _picture_evidence(told["evidence"], self.boards[ask.board][0])
        self.pipe.send((ask.id, "done", told))

    def _prefix(self, path: str | None, asked: float) -> tuple[Prefix, bool]:
        """The memory of a stream as of a question, as the model has read it, and whether it was read ahead."""
        if path is None:
            return self.answerer.read(None), False
        board = self.boards[path][0] if path in self.boards else StateBoard(path)
        warm = self._is_read(path, board, time.monotonic() - asked + GRACE_SECONDS)
        prefix = self.prefixes[path][1] if warm else self._read(path, board)
        self.boards[path] = (board, time.monotonic())  # from now on it is read ahead
        self.boards.move_to_end(path)
        while len(self.boards) > KEPT_BOARDS:
            self.boards.popitem(last=False)
        return prefix, warm

    def _is_read(self, path: str, board: StateBoard, tolerated: float = 0.0) -> bool:
        """Whether a stream's newest memory was read, or the one before a frame that came ``tolerated`` seconds ago."""
        if path not in self.prefixes:
            return False
        read = self.prefixes[path][0]
        frames, age = frames_seen(board)
        return read == frames or (read == frames - 1 and age < tolerated)

    def _read(self, path: str, board: StateBoard) -> Prefix:
        view = view_on(board, self.model)
        if view is None:
            raise UserError("the stream has not shown a frame yet; ask again in a moment")
        prefix = self.answerer.read(view)
        self.prefixes[path] = (view.frames, prefix)
        self.prefixes.move_to_end(path)
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)
        return prefix

    def read_ahead(self) -> bool:
        """Read the stream that was asked about last, if it has moved on; False when it has not."""
        if not self.boards:
            return False
        path, (board, asked) = next(reversed(self.boards.items()))
        if time.monotonic() - asked > WARM_SECONDS:
            return False
        if self._is_read(path, board):
            return False
        self._read(path, board)
        return True


def _picture_evidence(evidence: list[dict[str, Any]], board: StateBoard) -> None:
    """Put thumbnails (data URLs) to the slots that the answer looked at most."""
    pictures = thumbnails_on(board)
    for slot in sorted(evidence, key=lambda slot: -(slot["share"] or 0))[:SHOWN_THUMBNAILS]:
        if data := pictures.get(slot["exemplar"]):
            slot["thumbnail"] = "data:image/jpeg;base64," + base64.b64encode(data).decode()


def run_question_handler(model: str, orders: Connection) -> None:
    """The process's main function: say ``("ready", info)``, then answer until the pipe closes."""
    from flash_vstream.models.zoo import quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    try:
        mind = Mind(FlashVStream.from_pretrained(model), orders)
    except UserError as error:
        orders.send(str(error))
        return
    mind.model.network.vision_tower = torch.nn.Identity()  # it is for the frame handler to see
    orders.send(("ready", {}))
    try:
        while True:
            while orders.poll(0 if mind.active or mind.waiting else IDLE_SECONDS):
                order = orders.recv()
                if order is None:
                    return
                mind.take(order)
            if not mind.step() and not mind.waiting:
                mind.read_ahead()
    except (EOFError, OSError):
        pass  # whoever asks is gone


@dataclass(frozen=True)
class Event:
    """What comes of a question: ``kind`` is text (a piece), done (the whole answer) or error (why)."""

    kind: str
    value: Any


class QuestionDesk:
    """Where questions are handed in, from any thread: the question handler is kept alive behind it."""

    def __init__(self, model_name: str):
        self._events: dict[int, queue.SimpleQueue[Event]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._listener: threading.Thread | None = None
        self.handler = Supervised(run_question_handler, model_name, "question handler", self._listen_to, self._fail_all)

    def ask(
        self,
        board: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Generator[Event, None, None]:
        """Events of an answer as they come; the last is done or error. Closing it cancels the question."""
        asked = time.monotonic()
        with self._lock:
            self._number += 1
            number = self._number
            events = self._events[number] = queue.SimpleQueue()
        event = Event("text", "")
        try:
            self.handler.send(Ask(number, board, question, tuple(history), max_new_tokens, asked))
            while event.kind == "text":
                event = events.get()
                yield event
        except OSError:
            yield DIED
        finally:
            del self._events[number]
            if event.kind == "text":
                with contextlib.suppress(OSError):  # dead: nothing is left to cancel
                    self.handler.send(Cancel(number))

    def _listen_to(self, pipe: Connection) -> None:
        self._listener = threading.Thread(target=self._listen, args=(pipe,), name="answers", daemon=True)
        self._listener.start()

    def _listen(self, pipe: Connection) -> None:
        try:
            while True:
                number, kind, value = pipe.recv()
                if (events := self._events.get(number)) is not None:
                    events.put(Event(kind, value))
        except (EOFError, OSError):
            self._fail_all()

    def _fail_all(self) -> None:
        for events in list(self._events.values()):
            events.put(DIED)

    def close(self) -> None:
        """End the question handler; questions under way end with an error."""
        self.handler.close()


DIED = Event("error", "the question handler stopped while it answered; it is being started again, ask once more")
