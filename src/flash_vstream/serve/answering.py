"""A question in progress, cleaned up exactly once however its caller stops."""

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from typing import Any

from flash_vstream.live.question_client import Event

Finish = Callable[[str | None, str | None, dict[str, Any]], None]
log = logging.getLogger("flash_vstream.serve")


class Answering:
    """Iterates the events of an answer and reports how its question ended.

    Iterate it in one thread at a time. ``finish(answer, error, details)`` is called exactly once: after
    the last event, when fetching an event fails, or on ``close``, whichever is first. The ``done``
    event's value has the question's ``number`` as its ``id``.
    """

    def __init__(self, events: Generator[Event, None, None], number: int, finish: Finish):
        self._events, self._number, self._finish = events, number, finish
        self._outcome: tuple[str | None, str | None, dict[str, Any]] = (None, "nobody waited for the answer", {})
        self._ending = threading.Lock()
        self._ended = False

    def __iter__(self) -> "Answering":
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        try:
            event = next(self._events)
        except BaseException:
            self.close()
            raise
        if event.kind == "done":
            self._outcome = (event.value["text"], None, event.value)
            event = Event("done", {**event.value, "id": self._number})
        elif event.kind == "error":
            self._outcome = (None, event.value, {})
        if event.kind != "text":
            self.close()
        return event

    def close(self) -> None:
        """End the question if it has not ended yet. Do not call this while another thread waits for an event."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
        try:
            with contextlib.suppress(OSError):  # the question worker just died: nothing left to cancel
                self._events.close()
        finally:
            self._finish(*self._outcome)

    def __del__(self) -> None:
        # A last resort for callers that forget to close it; responses close it themselves.
        if not self._ended:
            log.warning("a question was dropped without being closed", extra={"question": self._number})
            self.close()
