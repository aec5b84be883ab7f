"""What a server does, without HTTP: streams, questions, clips, and what is kept of them."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.question_client import Event, QuestionClient
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import save_state
from flash_vstream.live.streams import LiveStreams, StreamStatus
from flash_vstream.models import hub
from flash_vstream.models.prompt_limit import PromptLimit
from flash_vstream.serve.clips import Clips, is_clip
from flash_vstream.serve.metrics import Metrics
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.store import StateFolder
from flash_vstream.video.capture import FrameRing
from flash_vstream.video.sources import Source

SAVE_SECONDS = 10.0
log = logging.getLogger("flash_vstream.serve")


@dataclass(frozen=True)
class Limits:
    """What a server takes on; beyond it callers get a 4xx that says so."""

    streams: int = 16
    questions_at_once: int = 64
    upload_bytes: int = 64 * 2**20
    frame_bytes: int = 8 * 2**20


class Service:
    """Live streams, the question client and the state folder of one server."""

    def __init__(self, model_name: str, access: AccessRules, state: Path | None = None, limits: Limits | None = None):
        self.model_name, self.access, self.limits = model_name, access, limits or Limits()
        self.store = StateFolder(state)
        self.live, self.question_client = _both(model_name)
        self.metrics = Metrics(self)
        self.started = time.time()
        self._asking = threading.Semaphore(self.limits.questions_at_once)
        self.clips = Clips(self.live)
        self._stopping = threading.Event()
        self._restore()
        self._saver = threading.Thread(target=self._save_often, name="saver", daemon=True)
        self._saver.start()

    # --- streams

    def _restore(self) -> None:
        """Watch again what was watched when the server stopped."""
        for name, fields in self.store.streams().items():
            try:
                source = replace(Source(**fields), rules=self.access.rules)
                self.live.add(name, source, self.store.memory_path(name))
            except UserError as error:
                log.warning("stream not restored", extra={"stream": name, "reason": str(error)})

    def add_stream(self, name: str, source: Source) -> None:
        """Watch a source; raises ``ApiError`` for a name that is taken, or one stream too many."""
        if name in self.live.names():
            raise ApiError(409, f"there is a stream called {name!r} already; choose another name, or delete it first")
        if len(self.stream_names()) >= self.limits.streams:
            raise ApiError(429, f"{self.limits.streams} streams are watched, which is the most; delete one first")
        self.live.add(name, replace(source, rules=self.access.rules), self.store.memory_path(name))
        self.store.add_stream(name, source)

    def remove_stream(self, name: str) -> None:
        """Stop watching and forget."""
        self.check_stream(name)
        self.live.remove(name)
        self.store.remove_stream(name)

    def stream_names(self) -> list[str]:
        """The streams that callers made (the clips of chat requests are not listed)."""
        return [name for name in self.live.names() if not is_clip(name)]

    def check_stream(self, name: str) -> None:
        """Raise ``ApiError`` (404) when there is no such stream."""
        if is_clip(name) or name not in self.live.names():
            raise ApiError(404, f"no stream is called {name[:80]!r}; see GET /v1/streams")

    def status(self, name: str) -> StreamStatus:
        """How a stream is doing."""
        self.check_stream(name)
        return self.live.status(name)

    def statuses(self) -> list[StreamStatus]:
        """How every stream is doing; one that goes meanwhile is left out."""
        found = []
        for name in self.stream_names():
            with contextlib.suppress(UserError):
                found.append(self.live.status(name))
        return found

    def shared(self, name: str) -> SharedTensors:
        """A stream's shared state; raises ``ApiError`` (409) before its first frame."""
        self.check_stream(name)
        shared = self.live.shared_state(name)
        if self.live.status(name).time is None:
            raise ApiError(409, f"stream {name!r} has not shown a frame yet; ask again in a moment")
        return shared

    def ring(self, name: str) -> FrameRing:
        """Where frames for a pushed stream are put; raises ``ApiError`` for other streams."""
        self.check_stream(name)
        order = self.live.order(name)
        if order.ring is None:
            raise ApiError(
                409, f"stream {name!r} has a source of its own; create one with source 'push' to send frames"
            )
        return FrameRing(order.ring, order.source.size)

    # --- questions

    @cached_property
    def prompt_limit(self) -> PromptLimit:
        """How long a question may be."""
        return PromptLimit(*hub.load_processor(self.model_name))

    def ask(
        self,
        stream: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_tokens: int = 96,
        stop: Sequence[str] = (),
        clip: str | None = None,
    ) -> Iterator[Event]:
        """Events of an answer; logged before it begins and when it ends, whatever the end is.

        ``clip`` names one of ``clips`` instead of a ``stream``. Raises ``ApiError`` at once when the question cannot
        be taken, ``PromptTooLongError`` when it does not fit the model.
        """
        shared = self.shared(stream).path if stream is not None else None
        if clip is not None and (watched := self.live.shared(clip)) is not None:
            shared = watched.path
        if not question.strip():
            raise ApiError(422, "the question is empty; write what you want to know")
        self.prompt_limit.check(question, history, max_tokens)
        if not self._asking.acquire(blocking=False):
            raise ApiError(
                429, f"{self.limits.questions_at_once} questions are being answered, which is the most; wait a little"
            )
        number = self.store.ask(stream or "", question)
        return self._answered(number, shared, question, history, max_tokens, stop)

    def _answered(
        self,
        number: int,
        shared: str | None,
        question: str,
        history: Sequence[tuple[str, str]],
        max_tokens: int,
        stop: Sequence[str],
    ) -> Iterator[Event]:
        answer: str | None = None
        error: str | None = "nobody waited for the answer"
        details: dict[str, Any] = {}
        try:
            with contextlib.closing(self.question_client.ask(shared, question, history, max_tokens, stop)) as events:
                for event in events:
                    if event.kind == "done":
                        answer, error, details = event.value["text"], None, event.value
                        event = Event("done", {**event.value, "id": number})
                    elif event.kind == "error":
                        error = event.value
                    yield event
        finally:
            self._asking.release()
            self.store.answer(number, answer, error, details)
            self.metrics.answered(details, error)

    def whole_answer(self, events: Iterator[Event]) -> dict[str, Any]:
        """The answer with all its details; raises ``ApiError`` (409) when it failed."""
        for event in events:
            if event.kind == "done":
                return dict(event.value)
            if event.kind == "error":
                raise ApiError(409, event.value)
        raise ApiError(409, "the answer broke off; ask again")

    # --- keeping

    def save(self) -> None:
        """Write every stream's memory to the state folder."""
        for name in self.stream_names():
            path = self.store.memory_path(name)
            with contextlib.suppress(UserError):  # removed meanwhile
                shared = self.live.shared_state(name)
                if path is not None:
                    save_state(shared, path)

    def _save_often(self) -> None:
        while not self._stopping.wait(SAVE_SECONDS):
            try:
                self.save()
            except OSError as error:
                log.error("memories could not be saved", extra={"reason": str(error)})

    def close(self) -> None:
        """Save and stop; every process ends."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._saver.join(timeout=5)
        try:
            self.save()
        except OSError as error:
            log.error("memories could not be saved", extra={"reason": str(error)})
        self.question_client.close()
        self.live.close()
        self.store.close()
        self.clips.close()


def _both(model_name: str) -> tuple[LiveStreams, QuestionClient]:
    """Both workers, started at once; when one cannot be, neither is left running."""
    with ThreadPoolExecutor(2) as pool:
        live, question_client = pool.submit(LiveStreams, model_name), pool.submit(QuestionClient, model_name)
    if (error := live.exception() or question_client.exception()) is not None:
        for started in (live, question_client):
            if started.exception() is None:
                started.result().close()
        raise error
    return live.result(), question_client.result()
