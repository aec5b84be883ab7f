"""The question worker: a process that holds the language model and answers questions about shared states.

It never waits for a frame. While idle, it reads the memory of the most recently questioned stream ahead of the next
question (the warm prefix), so that a question costs only its own tokens. Concurrent questions about any streams are
generated together, one token each in a step, and a new one joins at the next step. A memory that was not read ahead is
read between two steps, one at a time. An error or a timeout ends only the question it belongs to.

Standing questions take their turns too (``standing_questions``); what they find is sent under the number ``WATCHES``.
"""

import logging
import os
import signal
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.imports import no_garbage
from flash_vstream.live.messages import WATCHES, Ask, Cancel, DropWatch, Watch
from flash_vstream.live.published import frames_seen, read_thumbnails
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.standing_questions import StandingQuestions
from flash_vstream.live.stream_state import read_snapshot
from flash_vstream.models.answer import Answer, Prefix
from flash_vstream.models.choice import ModelChoice
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video.pictures import data_url

IDLE_SECONDS = 0.02
WARM_SECONDS = 300.0
"""How long after its last question a stream keeps being read ahead."""
AT_ONCE = 64
"""How many questions are answered concurrently; the rest wait in a queue."""
STEP_TOKENS = 128
"""Questions begin in a step until they have so many tokens to be read.

A step with all of many questions would let none of them, nor any answer in progress, say a word before all are read.
"""
KEPT_STATES, KEPT_PREFIXES = 64, 4
DROP_SECONDS = 1.0
"""How often the states of removed streams are released."""
EVIDENCE_THUMBNAILS = 6
GRACE_SECONDS = 0.5
"""The warm prefix may lack one frame, if that frame came less than this long before the question, or after it.

Without this, a question would wait for two readings wherever reading a memory takes as long as the interval between
frames.
"""
LOG_SECONDS = 10.0
"""The shortest interval between logged unexpected errors, so that callers cannot fill a disk."""
_ERROR_CHARACTERS = 500
log = logging.getLogger("flash_vstream.live")


@dataclass
class _Question:
    """A question in progress. ``shared`` stays mapped until its end; ``warm`` says if its memory was read ahead."""

    ask: Ask
    answer: Answer
    shared: SharedTensors | None
    warm: bool
    first_token_seconds: float | None = None


class QuestionWorker:
    """The question worker's state: the model, the prefixes read ahead, and the questions in progress."""

    def __init__(self, pipeline: FlashVStream, pipe: Connection):
        self.pipeline, self.pipe = pipeline, pipe
        self.generator = pipeline.generator  # built now, so that the first question need not wait for it
        self.waiting: deque[Ask] = deque()
        self.active: dict[int, _Question] = {}
        # By path: a stream's shared state, and when (monotonic seconds) its last question came.
        self.shared_states: OrderedDict[str, tuple[SharedTensors, float]] = OrderedDict()
        # By path: the number of frames in a memory, and the prefix read from it.
        self.prefixes: OrderedDict[str, tuple[int, Prefix]] = OrderedDict()
        self.standing = StandingQuestions(pipeline)
        self._watching = self.standing.turns()
        self._drop_at = self._log_at = 0.0

    def run(self) -> None:
        """Answer until the pipe closes or delivers None."""
        try:
            watching = False
            while True:
                while self.pipe.poll(0 if self.active or self.waiting or watching else IDLE_SECONDS):
                    order = self.pipe.recv()
                    if order is None:
                        return
                    self.take(order)
                watching = self.watch()
                if not self.step() and not self.waiting and not watching:
                    self.read_ahead()
                self.drop_removed()
        except (EOFError, OSError):
            pass  # the parent is gone

    def watch(self) -> bool:
        """Take one turn at the standing questions and send what they report; False when there was nothing to do."""
        reports = next(self._watching)
        for report in reports or ():
            self.pipe.send((WATCHES, "report", report))
        return reports is not None

    def take(self, order: Ask | Cancel | Watch | DropWatch) -> None:
        """Queue a question, cancel one, or set or drop a watch."""
        if isinstance(order, Watch):
            self.standing.set(order)
        elif isinstance(order, DropWatch):
            self.standing.drop(order.id)
        elif isinstance(order, Cancel):
            self.active.pop(order.id, None)
            self.waiting = deque(ask for ask in self.waiting if ask.id != order.id)
        else:
            self.waiting.append(order)

    def step(self) -> bool:
        """Generate one token for every question in progress; False when none remain."""
        for ask in [ask for ask in self.waiting if _is_over(ask)]:
            self.waiting.remove(ask)
            self.pipe.send((ask.id, "error", _over_message(ask)))
        for question in [question for question in self.active.values() if _is_over(question.ask)]:
            self._end(question.ask, "error", _over_message(question.ask))
        self._admit()
        questions = list(self.active.values())
        if questions:
            for question, outcome in zip(questions, self._advance(questions), strict=True):
                self._tell(question, outcome)
        return bool(self.active)

    def _admit(self) -> None:
        """Begin the questions that wait, as many as a step takes.

        It takes no more after one whose memory had to be read: others wait for that already.
        """
        tokens, cold = 0, False
        while self.waiting and len(self.active) < AT_ONCE and tokens < STEP_TOKENS and not cold:
            ask = self.waiting.popleft()
            try:
                question, more = self._begin(ask)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in tokenizers is not an Exception
                self._end(ask, "error", self._reason(error))
            else:
                self.active[ask.id] = question
                tokens += more
                cold = not question.warm and question.shared is not None

    def _begin(self, ask: Ask) -> tuple[_Question, int]:
        """A question in progress, and how many tokens its first step will read."""
        shared = self._shared(ask.shared_path) if ask.shared_path is not None else None
        prefix, warm = self._prefix(shared, ask.asked_at)
        answer = self.generator.ask(prefix, ask.question, ask.history, ask.max_new_tokens, ask.stop)
        tokens = self.generator.begin(answer)
        return _Question(ask, answer, shared, warm), tokens

    def _advance(self, questions: list[_Question]) -> list[list[str] | BaseException]:
        try:
            return self.generator.advance([question.answer for question in questions])
        except Exception as error:  # such as too little memory for all of them
            return [error] * len(questions)

    def _tell(self, question: _Question, outcome: list[str] | BaseException) -> None:
        """Send what a step has brought a question."""
        ask, answer = question.ask, question.answer
        if isinstance(outcome, BaseException):
            self._end(ask, "error", self._reason(outcome))
            return
        if outcome:
            question.first_token_seconds = question.first_token_seconds or time.monotonic() - ask.asked_at
            self.pipe.send((ask.id, "text", "".join(outcome)))
        if self.generator.is_open(answer):
            return
        details = answer.to_dict() | {"warm": question.warm}
        details["first_token_seconds"] = question.first_token_seconds or time.monotonic() - ask.asked_at
        if question.shared is not None:
            _add_thumbnails(details["evidence"], question.shared)
        self._end(ask, "done", details)

    def _end(self, ask: Ask, kind: str, value: Any) -> None:
        self.active.pop(ask.id, None)
        self.pipe.send((ask.id, kind, value))

    def _reason(self, error: BaseException) -> str:
        """What to tell the caller of a question that failed; logs what should not have happened."""
        if isinstance(error, FileNotFoundError):
            return "the stream is not watched any more"
        if isinstance(error, UserError | ValueError):
            return str(error)[:_ERROR_CHARACTERS]
        if time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + LOG_SECONDS
            log.warning("a question could not be answered", exc_info=error)
        reason = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
        return f"the question could not be answered ({reason}); ask in other words"

    def _shared(self, path: str) -> SharedTensors:
        """The shared state at ``path``; marks it as the stream to read ahead."""
        shared = self.shared_states[path][0] if path in self.shared_states else SharedTensors(path)
        self.shared_states[path] = (shared, time.monotonic())
        self.shared_states.move_to_end(path)
        while len(self.shared_states) > KEPT_STATES:
            self.shared_states.popitem(last=False)
        return shared

    def _prefix(self, shared: SharedTensors | None, asked_at: float) -> tuple[Prefix, bool]:
        """The prefix for a question asked at ``asked_at``, and whether it was warm (read ahead)."""
        if shared is None:
            return self.generator.read(None), False
        warm = self._is_read(shared, time.monotonic() - asked_at + GRACE_SECONDS)
        return (self.prefixes[shared.path][1] if warm else self._read(shared)), warm

    def _is_read(self, shared: SharedTensors, tolerated: float = 0.0) -> bool:
        """Whether the prefix is current, or lacks just one frame that came less than ``tolerated`` seconds ago."""
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
        """Read the most recently questioned stream if it has new frames; returns whether it read anything."""
        if not self.shared_states:
            return False
        path, (shared, asked_at) = next(reversed(self.shared_states.items()))
        if time.monotonic() - asked_at > WARM_SECONDS:
            return False
        try:
            if self._is_read(shared) or frames_seen(shared)[0] == 0:
                return False
            self._read(shared)
        except Exception as error:  # the next question about the stream will report it
            log.warning("a memory could not be read ahead: %s: %s", type(error).__name__, error)
            self._drop(path)
            return False
        return True

    def drop_removed(self) -> None:
        """Release removed streams: the system cannot free their shared memory while it is mapped."""
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
    """Add thumbnails (data URLs) to the slots that the answer attended to most."""
    pictures = read_thumbnails(shared)
    for slot in sorted(evidence, key=lambda slot: -(slot["share"] or 0))[:EVIDENCE_THUMBNAILS]:
        if data := pictures.get(slot["exemplar"]):
            slot["thumbnail"] = data_url(data)


def run_question_worker(model: str | ModelChoice, orders: Connection) -> None:
    """The process's main function: send ``("ready", info)``, then answer until the pipe closes.

    If the model cannot be loaded, it sends the reason instead.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with no_garbage():
            worker = QuestionWorker(FlashVStream.for_answers(model), orders)
    except UserError as error:
        orders.send(str(error))
        return
    worker.pipeline.model.drop_vision()  # the frame worker has it
    worker.generator.drop_unused()
    orders.send(("ready", {}))
    worker.run()
