"""The parent's client for the question worker: ask from any thread, receive events."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from flash_vstream.live.messages import WATCHES, Ask, Cancel, DropWatch, Report, Watch
from flash_vstream.live.streams import WorkerHealth, health
from flash_vstream.live.supervisor import Supervisor
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS

QUESTION_SECONDS = 120.0
"""The time limit for a question, from asking it to the end of its answer."""
HANG_SECONDS = 30.0
"""How long the question worker may stay silent after that limit before it is killed and restarted."""
END_SECONDS = 5.0
"""How long closing waits for whoever takes the last reports."""
log = logging.getLogger("flash_vstream.live")


@dataclass(frozen=True)
class Event:
    """One event of an answer: ``kind`` is text (a piece), done (the whole answer) or error (the reason)."""

    kind: str
    value: Any


DIED = Event("error", "the question worker stopped while it answered; it is restarting, please ask again")
HUNG = Event("error", "the question worker did not answer in time; it is restarting, please ask again")


class QuestionClient:
    """Takes questions from any thread and keeps the question worker alive.

    A question that takes longer than ``question_seconds`` ends with an error; the others continue. A worker that stays
    silent for ``hang_seconds`` more is killed and restarted. Raises ``UserError`` if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | ModelChoice,
        question_seconds: float = QUESTION_SECONDS,
        hang_seconds: float = HANG_SECONDS,
    ):
        self._question_seconds, self._hang_seconds = question_seconds, hang_seconds
        self._events: dict[int, queue.SimpleQueue[Event]] = {}
        self._watches: dict[str, Watch] = {}
        self.on_report: Callable[[Report], None] = lambda report: None
        """Called with each report of a watch, in a thread of its own."""
        self._number = 0
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        # Whoever takes reports may hold what a sender to the worker waits for, so the thread that listens to the worker
        # must not wait for them: the worker would wait for it.
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self.worker = Supervisor(_answer, ModelChoice.of(model), "question worker", self._listen_to, self._fail_all)
        self._reporter = threading.Thread(target=self._pass_on, name="reports", daemon=True)
        self._reporter.start()

    def workers(self) -> dict[str, WorkerHealth]:
        """The question worker."""
        return {"question": health(self.worker)}

    def ask(
        self,
        shared_path: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Generator[Event, None, None]:
        """Yield an answer's events as they arrive; the last is done or error. Closing the generator cancels.

        The question is about the stream whose shared state is at ``shared_path``; None means plain chat.
        """
        asked_at = time.monotonic()
        with self._lock:
            self._number += 1
            number = self._number
            events = self._events[number] = queue.SimpleQueue()
        event = Event("text", "")
        restarts = -1
        try:
            seconds = self._question_seconds
            turns = tuple(history)
            ask = Ask(number, shared_path, question, turns, max_new_tokens, asked_at, seconds, tuple(stop))
            self.worker.send(ask)
            restarts = self.worker.restarts
            while event.kind == "text":
                event = self._next_event(events, asked_at)
                yield event
        except OSError:
            yield DIED
        finally:
            del self._events[number]
            # A worker that started after the question was sent has never seen it.
            if event.kind == "text" and restarts == self.worker.restarts:
                with contextlib.suppress(OSError):  # the worker is dead: there is nothing to cancel
                    self.worker.send(Cancel(number))

    def _next_event(self, events: "queue.SimpleQueue[Event]", asked_at: float) -> Event:
        """The question's next event. A worker that hangs is killed, and the event is then an error."""
        while True:
            patient_until = max(asked_at + self._question_seconds, self._heard) + self._hang_seconds
            try:
                return events.get(timeout=max(0.0, patient_until - time.monotonic()))
            except queue.Empty:
                if max(asked_at + self._question_seconds, self._heard) + self._hang_seconds <= time.monotonic():
                    self.worker.kill()
                    return HUNG

    def set_watch(self, watch: Watch) -> None:
        """Add a watch, or replace the one with its id; a worker that is restarted goes on from its newest state."""
        with self.worker.lock:
            with self._lock:
                self._watches[watch.id] = watch
            with contextlib.suppress(OSError):  # the worker just died; its successor gets all watches
                self.worker.pipe.send(watch)

    def drop_watch(self, watch: str) -> None:
        """Forget a watch; do nothing if there is none with this id."""
        with self.worker.lock:
            with self._lock:
                known = self._watches.pop(watch, None)
            if known is not None:
                with contextlib.suppress(OSError):
                    self.worker.pipe.send(DropWatch(watch))

    def _take(self, report: Report) -> None:
        """Keep a watch's newest state, and pass the report on."""
        with self._lock:  # not the worker's: whoever holds that may be waiting for the worker to read
            watch = self._watches.get(report.watch)
            if watch is None:
                return
            self._watches[report.watch] = replace(watch, state=report.state)
        self._reports.put(report)

    def _pass_on(self) -> None:
        while (report := self._reports.get()) is not None:
            try:
                self.on_report(report)
            except Exception as error:  # later reports must still come
                log.error("a watch's report was lost", exc_info=error)

    def _listen_to(self, pipe: Connection) -> None:
        self._heard = time.monotonic()
        for watch in list(self._watches.values()):
            pipe.send(watch)
        threading.Thread(target=self._listen, args=(pipe,), name="answers", daemon=True).start()

    def _listen(self, pipe: Connection) -> None:
        try:
            while True:
                number, kind, value = pipe.recv()
                self._heard = time.monotonic()
                if number == WATCHES:
                    self._take(value)
                elif (events := self._events.get(number)) is not None:
                    events.put(Event(kind, value))
        except (EOFError, OSError):
            self._fail_all()

    def _fail_all(self) -> None:
        for events in list(self._events.values()):
            events.put(DIED)

    def close(self) -> None:
        """Stop the question worker and pass on its last reports; questions in progress end with an error.

        Safe to call twice.
        """
        self.worker.close()
        self._reports.put(None)
        self._reporter.join(timeout=END_SECONDS)


def _answer(model: ModelChoice, pipe: Connection) -> None:
    """The question worker's process, which alone imports what it needs."""
    from flash_vstream.live.question_worker import run_question_worker

    run_question_worker(model, pipe)
