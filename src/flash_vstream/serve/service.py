"""What a server does, without HTTP: streams, questions, clips, and what is kept of them."""

import contextlib
import hashlib
import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.question_client import Event, QuestionClient
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import save_state
from flash_vstream.live.streams import LiveStreams, StreamStatus
from flash_vstream.serve.metrics import Metrics
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.store import StateFolder
from flash_vstream.video.capture import FrameRing
from flash_vstream.video.sources import Source

SAVE_SECONDS = 10.0
CLIPS_KEPT = 4
CLIP_SECONDS = 600.0
"""How long a clip may take to be watched."""
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
        self._scratch = tempfile.TemporaryDirectory(prefix="flash-vstream-clips-")
        self._clips: OrderedDict[str, Path] = OrderedDict()
        self._clip_lock = threading.Lock()
        self._stopping = threading.Event()
        self._restore()
        self._saver = threading.Thread(target=self._save_often, name="saver", daemon=True)
        self._saver.start()

    # --- streams

    def _restore(self) -> None:
        """Watch again what was watched when the server stopped."""
        for name, fields in self.store.streams().items():
            try:
                self.live.add(name, Source(**fields), self.store.memory_path(name))
            except UserError as error:
                log.warning("stream not restored", extra={"stream": name, "reason": str(error)})

    def add_stream(self, name: str, source: Source) -> None:
        """Watch a source; raises ``ApiError`` for a name that is taken, or one stream too many."""
        if name in self.live.names():
            raise ApiError(409, f"there is a stream called {name!r} already; choose another name, or delete it first")
        if len(self.stream_names()) >= self.limits.streams:
            raise ApiError(429, f"{self.limits.streams} streams are watched, which is the most; delete one first")
        self.live.add(name, source, self.store.memory_path(name))
        self.store.add_stream(name, source)

    def remove_stream(self, name: str) -> None:
        """Stop watching and forget."""
        self.check_stream(name)
        self.live.remove(name)
        self.store.remove_stream(name)

    def stream_names(self) -> list[str]:
        """The streams that callers made (the clips of chat requests are not listed)."""
        return [name for name in self.live.names() if name not in self._clips]

    def check_stream(self, name: str) -> None:
        """Raise ``ApiError`` (404) when there is no such stream."""
        if name not in self.live.names():
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

    def ask(
        self, stream: str | None, question: str, history: Sequence[tuple[str, str]] = (), max_tokens: int = 96
    ) -> Iterator[Event]:
        """Events of an answer; logged before it begins and when it ends, whatever the end is.

        Raises ``ApiError`` at once when the question cannot be taken.
        """
        shared = self.shared(stream).path if stream is not None else None
        if not question.strip():
            raise ApiError(422, "the question is empty; write what you want to know")
        if not self._asking.acquire(blocking=False):
            raise ApiError(
                429, f"{self.limits.questions_at_once} questions are being answered, which is the most; wait a little"
            )
        number = self.store.ask(stream or "", question)
        return self._answered(number, shared, question, history, max_tokens)

    def _answered(
        self, number: int, shared: str | None, question: str, history: Sequence[tuple[str, str]], max_tokens: int
    ) -> Iterator[Event]:
        answer: str | None = None
        error: str | None = "nobody waited for the answer"
        details: dict[str, Any] = {}
        try:
            with contextlib.closing(self.question_client.ask(shared, question, history, max_tokens)) as events:
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

    # --- clips

    def clip(self, data: bytes, fps: float) -> str:
        """The stream of an uploaded clip, watched to its end; the same clip is watched once.

        Raises ``ApiError`` for a clip that cannot be watched.
        """
        name = f"clip-{hashlib.sha256(data).hexdigest()[:24]}-{fps:g}"
        with self._clip_lock:
            if name not in self._clips:
                path = Path(self._scratch.name) / name
                path.write_bytes(data)
                self._clips[name] = path
                self.live.add(name, Source(str(path), fps, pace="fast"))
                while len(self._clips) > CLIPS_KEPT:
                    self._forget_clip(next(iter(self._clips)))
            self._clips.move_to_end(name)
        deadline = time.monotonic() + CLIP_SECONDS
        while (status := self.live.status(name)).state not in ("ended", "failed"):
            if time.monotonic() > deadline:
                raise ApiError(422, f"the clip took longer than {CLIP_SECONDS:.0f} s to watch; send a shorter one")
            time.sleep(0.02)
        if status.state == "failed" or status.time is None:
            with self._clip_lock:
                self._forget_clip(name)
            why = (status.error or "no frame of it could be decoded").replace(
                str(Path(self._scratch.name) / name), "it"
            )
            raise ApiError(422, f"the clip cannot be watched: {why}")
        return name

    def _forget_clip(self, name: str) -> None:
        path = self._clips.pop(name, None)
        if path is not None:
            self.live.remove(name)
            path.unlink(missing_ok=True)

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
        self._scratch.cleanup()


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
