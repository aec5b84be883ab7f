"""The question worker from the outside: questions in, events out, from any thread."""

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from flash_vstream.live.question_worker import Ask, Cancel, run_question_worker
from flash_vstream.live.supervisor import Supervisor
from flash_vstream.models.generation import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Event:
    """What comes of a question: ``kind`` is text (a piece), done (the whole answer) or error (why)."""

    kind: str
    value: Any


class QuestionClient:
    """Where questions are handed in, from any thread: the question worker is kept alive behind it."""

    def __init__(self, model_name: str):
        self._events: dict[int, queue.SimpleQueue[Event]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._listener: threading.Thread | None = None
        self.worker = Supervisor(run_question_worker, model_name, "question worker", self._listen_to, self._fail_all)

    def ask(
        self,
        shared: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Generator[Event, None, None]:
        """Events of an answer as they come; the last is done or error. Closing it cancels the question."""
        asked = time.monotonic()
        with self._lock:
            self._number += 1
            number = self._number
            events = self._events[number] = queue.SimpleQueue()
        event = Event("text", "")
        try:
            self.worker.send(Ask(number, shared, question, tuple(history), max_new_tokens, asked, tuple(stop)))
            while event.kind == "text":
                event = events.get()
                yield event
        except OSError:
            yield DIED
        finally:
            del self._events[number]
            if event.kind == "text":
                with contextlib.suppress(OSError):  # dead: nothing is left to cancel
                    self.worker.send(Cancel(number))

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
        """End the question worker; questions under way end with an error."""
        self.worker.close()


DIED = Event("error", "the question worker stopped while it answered; it is being started again, ask once more")
