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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.serve.access import Access, Refused
from flash_vstream.serve.metrics import Metrics
from flash_vstream.stream.board import StateBoard
from flash_vstream.stream.live import LiveStreams, StreamStatus
from flash_vstream.stream.published import save_board
from flash_vstream.stream.question_handler import Event, QuestionDesk
from flash_vstream.stream.store import StateFolder
from flash_vstream.video.process import FrameRing
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
    """Live streams, the question desk and the state folder of one server."""

    def __init__(self, model_name: str, access: Access, state: Path | None = None, limits: Limits | None = None):
        self.model_name, self.access, self.limits = model_name, access, limits or Limits()
        self.store = StateFolder(state)
        self.live, self.desk = _both(model_name)
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
        """Watch a source; raises ``Refused`` for a name that is taken, or one stream too many."""
        if name in self.live.names():
            raise Refused(409, f"there is a stream called {name!r} already; choose another name, or delete it first")
        if len(self.stream_names()) >= self.limits.streams:
            raise Refused(429, f"{self.limits.streams} streams are watched, which is the most; delete one first")
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
        """Raise ``Refused`` (404) when there is no such stream."""
        if name not in self.live.names():
            raise Refused(404, f"no stream is called {name[:80]!r}; see GET /v1/streams")

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

    def board(self, name: str) -> StateBoard:
        """A stream's board; raises ``Refused`` (409) before its first frame."""
        self.check_stream(name)
        board = self.live.board(name)
        if board is None or self.live.status(name).time is None:
            raise Refused(409, f"stream {name!r} has not shown a frame yet; ask again in a moment")
        return board

    def ring(self, name: str) -> FrameRing:
        """Where frames for a pushed stream are put; raises ``Refused`` for other streams."""
        self.check_stream(name)
        order = self.live.order(name)
        if order.ring is None:
            raise Refused(409, f"stream {name!r} has a source of its own; create one with source 'push' to send frames")
        return FrameRing(order.ring, order.source.size)

    # --- questions

    def ask(
        self, stream: str | None, question: str, history: Sequence[tuple[str, str]] = (), max_tokens: int = 96
    ) -> Iterator[Event]:
        """Events of an answer; logged before it begins and when it ends, whatever the end is.

        Raises ``Refused`` at once when the question cannot be taken.
        """
        board = self.board(stream).path if stream is not None else None
        if not question.strip():
            raise Refused(422, "the question is empty; write what you want to know")
        if not self._asking.acquire(blocking=False):
            raise Refused(
                429, f"{self.limits.questions_at_once} questions are being answered, which is the most; wait a little"
            )
        number = self.store.ask(stream or "", question)
        return self._answered(number, board, question, history, max_tokens)

    def _answered(
        self, number: int, board: str | None, question: str, history: Sequence[tuple[str, str]], max_tokens: int
    ) -> Iterator[Event]:
        answer: str | None = None
        error: str | None = "nobody waited for the answer"
        details: dict[str, Any] = {}
        try:
            with contextlib.closing(self.desk.ask(board, question, history, max_tokens)) as events:
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
        """The answer with all its details; raises ``Refused`` (409) when it failed."""
        for event in events:
            if event.kind == "done":
                return dict(event.value)
            if event.kind == "error":
                raise Refused(409, event.value)
        raise Refused(409, "the answer broke off; ask again")

    # --- clips

    def clip(self, data: bytes, fps: float) -> str:
        """The stream of an uploaded clip, watched to its end; the same clip is watched once.

        Raises ``Refused`` for a clip that cannot be watched.
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
                raise Refused(422, f"the clip took longer than {CLIP_SECONDS:.0f} s to watch; send a shorter one")
            time.sleep(0.02)
        if status.state == "failed" or status.time is None:
            with self._clip_lock:
                self._forget_clip(name)
            why = (status.error or "no frame of it could be decoded").replace(
                str(Path(self._scratch.name) / name), "it"
            )
            raise Refused(422, f"the clip cannot be watched: {why}")
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
                board = self.live.board(name)
                if path is not None and board is not None:
                    save_board(board, path)

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
        self.desk.close()
        self.live.close()
        self.store.close()
        self._scratch.cleanup()


def _both(model_name: str) -> tuple[LiveStreams, QuestionDesk]:
    """Both handlers, started at once; when one cannot be, neither is left running."""
    with ThreadPoolExecutor(2) as pool:
        live, desk = pool.submit(LiveStreams, model_name), pool.submit(QuestionDesk, model_name)
    if (error := live.exception() or desk.exception()) is not None:
        for started in (live, desk):
            if started.exception() is None:
                started.result().close()
        raise error
    return live.result(), desk.result()


def command_line_stream(text: str, fps: float) -> tuple[str, Source]:
    """``NAME=SOURCE`` of ``serve --stream``; raises ``UserError`` when it is not that."""
    name, equals, source = text.partition("=")
    if not equals or not name or not source:
        raise UserError(f"--stream {text!r} must be NAME=SOURCE, such as door=rtsp://camera.local/1")
    return name, replace(Source(source, fps))
