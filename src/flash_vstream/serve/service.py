"""The server without HTTP: streams, questions, clips, and what is saved of them."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.engine import FrameSink, StartEngine, local_engine
from flash_vstream.live.messages import Report
from flash_vstream.live.published import PublishedState, read_thumbnails, save_state
from flash_vstream.live.streams import StreamStatus, WorkerHealth
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.light_text import load_text
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS, PromptLimit
from flash_vstream.serve.alert_clips import AlertClips
from flash_vstream.serve.alert_store import AlertStore
from flash_vstream.serve.answering import Answering
from flash_vstream.serve.clips import Clips, is_clip
from flash_vstream.serve.in_progress import InProgress
from flash_vstream.serve.metrics import Metrics
from flash_vstream.serve.recorder import Recorder
from flash_vstream.serve.recordings import Recordings
from flash_vstream.serve.schemas import plain_text
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.state_url import StateUrl, is_url
from flash_vstream.serve.store import SavedStream, StateFolder, StoreError
from flash_vstream.serve.transcript import MARK, Descriptions, Transcript
from flash_vstream.serve.watches import Watches
from flash_vstream.video.pictures import data_url
from flash_vstream.video.shared_memory import OwnedFolder
from flash_vstream.video.sources import Source, hide_secrets

SAVE_SECONDS = 10.0
"""How often memories are saved, and failed writes and streams that failed to start are retried."""
log = logging.getLogger("flash_vstream.serve")


@dataclass(frozen=True)
class Limits:
    """What one server accepts; beyond these limits callers get a 4xx that says so."""

    streams: int = 16
    questions_at_once: int = 64
    upload_bytes: int = 64 * 2**20
    json_bytes: int = 2**20
    frame_bytes: int = 8 * 2**20


@dataclass(frozen=True)
class NamedSource:
    """A source from the command line; ``fps=None`` keeps the saved rate, or uses 1."""

    source: str
    fps: float | None = None


class Service:
    """An engine's streams and questions, and the state folder, of one server.

    ``streams`` are watched from the start and override saved streams of the same name. ``describe`` is how often
    (seconds of stream time) every stream is described, ``record`` how many bytes of frames the folder may keep.
    ``state`` is a folder, or a URL of fsspec (``state_url``), where nothing is recorded. Raises ``UserError`` if the
    model cannot be loaded or the state cannot be used.
    """

    def __init__(
        self,
        model: str | ModelChoice,
        access: AccessRules,
        state: Path | str | None = None,
        limits: Limits | None = None,
        streams: Mapping[str, NamedSource] | None = None,
        start_engine: StartEngine = local_engine,
        describe: float | None = None,
        record: int | None = None,
    ):
        self.model = ModelChoice.of(model)
        self.model_name, self.access, self.limits = str(self.model), access, limits or Limits()
        with ExitStack() as on_error:
            self._far = StateUrl(state) if isinstance(state, str) and is_url(state) else None
            if self._far is not None:
                on_error.callback(self._far.close)
                if record is not None:
                    raise UserError("frames are recorded in a folder of this machine: --record needs --state FOLDER")
                state = self._far.folder
            folder = Path(state) if state is not None else None
            self.store = StateFolder(folder)
            on_error.callback(self.store.close)
            alerts = AlertStore(folder)
            on_error.callback(alerts.close)
            transcript = Transcript(folder)
            on_error.callback(transcript.close)
            names = self.store.stream_names()
            self.recordings = Recordings(folder / "recordings" if folder is not None else None, record, names)
            engine = start_engine(self.model)
            self.live, self.question_client = engine.streams, engine.questions
            on_error.pop_all()
        self.recorder = Recorder(self.recordings, self.live)
        self.alert_clips = AlertClips(self.recordings, self.recorder)
        self.watches = Watches(
            alerts, self.question_client, access, self._place, self._is_live, self.recorder.records, names
        )
        self.descriptions = Descriptions(transcript, self.question_client, self._place, describe, names)
        self.question_client.on_report = self._take_report
        self.metrics = Metrics(self.statuses, self.restarts)
        self.started, self._began = time.time(), time.monotonic()
        self.saving_error: str | None = None
        self._waiting: dict[str, SavedStream] = {}
        self._changing = threading.RLock()  # held while streams change or memories are saved
        self._questions = InProgress(self.limits.questions_at_once)
        self._scratch = OwnedFolder("flash-vstream-edits")
        self.clips = Clips(self.live)
        self.metrics.gauge("questions_in_progress", "Questions being answered", lambda: self._questions.count)
        self.metrics.gauge("clips_in_progress", "Clips being watched for a question", lambda: self.clips.in_progress)
        self.metrics.gauge("alerts", "Alerts told since the server started", lambda: self.watches.alerts)
        failed_webhooks = "Tries to deliver a webhook that failed since the server started"
        self.metrics.gauge("webhook_failures", failed_webhooks, lambda: self.watches.webhooks.failed)
        given_up = "Webhooks given up since the server started, each an alert that a target has missed"
        self.metrics.gauge("webhooks_given_up", given_up, lambda: self.watches.webhooks.given_up)
        failed_brokers = "Connections to MQTT brokers that failed or broke since the server started"
        self.metrics.gauge("mqtt_failures", failed_brokers, lambda: self.watches.brokers.failures)
        self.recorder.report_to(self.metrics)
        self._stopping = threading.Event()
        self._saver = threading.Thread(target=self._save_often, name="saver", daemon=True)
        try:
            self._restore(dict(streams or {}))
        except BaseException:
            self.close()
            raise
        self._saver.start()

    # --- streams

    def _restore(self, named: dict[str, NamedSource]) -> None:
        """Resume the saved streams, and start those named on the command line."""
        for saved in self.store.saved_streams():
            if (given := named.pop(saved.name, None)) is not None:
                saved = self._replace_saved(saved, given)
            self._watch_saved(saved)
        for name, given in named.items():
            try:
                self.add_stream(name, Source(given.source, 1.0 if given.fps is None else given.fps))
            except ApiError as error:
                raise UserError(f"--stream {name}: {error}") from None

    def _replace_saved(self, saved: SavedStream, given: NamedSource) -> SavedStream:
        """Replace a saved source with the command line's; a different source starts a new memory."""
        old_fields = saved.fields if saved.fields is not None and saved.fields["name"] == given.source else {}
        values = {"fps": 1.0, **old_fields, "name": given.source}
        values |= {"fps": given.fps} if given.fps is not None else {}
        try:
            if not old_fields:
                self.store.set_memory_aside(saved.name)
                log.warning("the source has changed: its memory starts over", extra={"stream": saved.name})
            self.store.add_stream(saved.name, Source(**values))
        except StoreError as error:
            raise UserError(f"--stream {saved.name}: the state folder cannot be written ({error})") from None
        return SavedStream(saved.name, values)

    def _watch_saved(self, saved: SavedStream) -> None:
        """Watch a saved stream; on failure show it as failed and retry later."""
        try:
            if saved.fields is None:
                raise UserError(saved.error)
            self._watch(saved.name, Source(**saved.fields), self.store.memory_path(saved.name))
        except Exception as error:  # a damaged entry must not stop the other streams
            if saved.name not in self._waiting:
                log.warning("stream not restored", extra={"stream": saved.name, "reason": str(error)})
            self._waiting[saved.name] = replace(saved, error=str(error))
        else:
            self._waiting.pop(saved.name, None)

    def _watch(self, name: str, source: Source, saved: Path | None) -> None:
        """Watch a source under this server's access rules, which are not saved with it."""
        self.live.add(name, replace(source, rules=self.access.rules), saved)
        self.recordings.follow(name)
        self.watches.follow(name)
        self.descriptions.follow(name)

    def _take_report(self, report: Report) -> None:
        takes = self.descriptions.take if report.watch.startswith(MARK) else self.watches.take
        takes(report)

    def _place(self, name: str) -> tuple[str, float] | None:
        """The path of a stream's shared state and its frame rate; None while it is not watched."""
        try:
            return self.live.shared_state(name).path, self.live.source(name).fps
        except UserError:
            return None

    def _is_live(self, name: str) -> bool:
        """Whether frames of a stream arrive."""
        with suppress(UserError):
            return self.live.status(name).state == "live"
        return False

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Context for a change to what belongs to a stream; raises ``ApiError`` if that is not possible."""
        with self._changing, _disk_errors():
            self.check_stream(name)
            yield

    def add_stream(self, name: str, source: Source) -> None:
        """Watch a source and save it; raises ``ApiError``, in which case nothing has changed.

        The status is 409 if the name is taken or the state folder cannot be written, 429 if there are
        too many streams.
        """
        with self._changing:
            self._check_free(name)
            if len(self.stream_names()) >= self.limits.streams:
                raise ApiError(429, f"{self.limits.streams} streams are being watched, the maximum; delete one first")
            with _disk_errors():
                self.store.add_stream(name, source)
            try:
                self._watch(name, source, self.store.memory_path(name))
            except BaseException:
                with suppress(StoreError):
                    self.store.remove_stream(name)
                raise

    def edit_stream(
        self, name: str, new_name: str | None = None, fps: float | None = None, record: bool | None = None
    ) -> None:
        """Change a stream's name, frame rate or whether it is recorded; keep its memory and questions.

        Watching pauses briefly. Raises ``ApiError``, in which case nothing has changed.
        """
        with self._changing:
            self.check_stream(name)
            if name not in self.live.names():
                raise ApiError(409, f"stream {name!r} cannot be watched now; edit it when it can, or delete it")
            source, new_name = replace(self.live.source(name), rules=None), new_name or name
            edited = replace(source, fps=fps or source.fps, record=source.record if record is None else record)
            if (new_name, edited) == (name, source):
                return
            if new_name != name:
                self._check_free(new_name)
            memory = self.store.memory_path(new_name) or Path(self._scratch.path) / f"{new_name}.safetensors"
            shared = self._shared_state(name)
            with _disk_errors(), ExitStack() as on_error:
                if new_name != name:  # or a later stream of that name would inherit this memory
                    on_error.callback(memory.unlink, missing_ok=True)
                if shared is None or not _save(shared, memory):
                    raise ApiError(409, f"stream {name!r} is still starting; try again in a moment")
                for renamed in (self.watches, self.descriptions.transcript, self.recordings):
                    renamed.rename_stream(name, new_name)
                    on_error.callback(renamed.rename_stream, new_name, name)
                self.store.edit_stream(name, new_name, edited)
                on_error.pop_all()
            self.descriptions.forget(name)
            self.live.remove(name)
            try:
                self._watch(new_name, edited, memory)
            except UserError as error:
                self._waiting[new_name] = SavedStream(new_name, asdict(edited), str(error))
                self.watches.follow(new_name)

    def _check_free(self, name: str) -> None:
        if name in self.live.names() or name in self._waiting:
            raise ApiError(409, f"there is a stream called {name!r} already; choose another name, or delete it first")

    def remove_stream(self, name: str) -> None:
        """Stop watching a stream and delete it; raises ``ApiError``, in which case nothing has changed."""
        with self._changing:
            self.check_stream(name)
            with _disk_errors():
                self.store.remove_stream(name)
            self.watches.remove_stream(name)
            self.descriptions.remove_stream(name)
            self.recordings.remove_stream(name)
            self.alert_clips.clear()
            if self._waiting.pop(name, None) is None:
                self.live.remove(name)

    def stream_names(self) -> list[str]:
        """The streams that callers created, including those waiting for a retry but not the clips of chats."""
        return [name for name in self.live.names() if not is_clip(name)] + list(self._waiting)

    def check_stream(self, name: str) -> None:
        """Raise ``ApiError`` (404) if there is no such stream."""
        if is_clip(name) or (name not in self.live.names() and name not in self._waiting):
            raise ApiError(404, f"no stream is called {name[:80]!r}; see GET /v1/streams")

    def status(self, name: str) -> StreamStatus:
        """A stream's status."""
        self.check_stream(name)
        if (waiting := self._waiting.get(name)) is not None:
            return _failed(waiting)
        return self.live.status(name)

    def statuses(self) -> list[StreamStatus]:
        """Every stream's status; skips streams removed in the meantime."""
        statuses = []
        for name in self.stream_names():
            with suppress(UserError, ApiError):
                statuses.append(self.status(name))
        return statuses

    def workers(self) -> dict[str, WorkerHealth]:
        """The engine's workers by name."""
        return {**self.live.workers(), **self.question_client.workers()}

    def restarts(self) -> dict[str, int]:
        """How often each worker was restarted."""
        return {name: worker.restarts for name, worker in self.workers().items()}

    @property
    def uptime(self) -> float:
        """Seconds since the server started, by a clock that cannot be set."""
        return time.monotonic() - self._began

    def problems(self) -> list[str]:
        """Current problems in plain words; empty if there are none."""
        problems = [
            f"the {name} worker is being started again" for name, worker in self.workers().items() if not worker.alive
        ]
        if self.saving_error is not None:
            problems.append(f"the state folder cannot be written: {self.saving_error}")
        if self.recorder.error is not None:
            problems.append(f"frames cannot be recorded: {self.recorder.error}")
        failed = [status for status in self.statuses() if status.state == "failed"]
        return problems + [f"stream {status.name} failed: {status.error}" for status in failed]

    def shared(self, name: str) -> PublishedState:
        """A stream's shared state; raises ``ApiError`` (409) before its first frame."""
        self.check_stream(name)
        shared = self._shared_state(name)
        if shared is None or self.live.status(name).time is None:
            raise ApiError(409, f"stream {name!r} has not shown a frame yet; ask again in a moment")
        return shared

    def _shared_state(self, name: str) -> PublishedState | None:
        """A stream's shared state; None if it has none yet."""
        return self.live.shared_state(name) if name in self.live.names() else None

    def sink(self, name: str) -> FrameSink:
        """What takes frames for a ``push`` stream; raises ``ApiError`` for other streams."""
        self.check_stream(name)
        sink = self.live.sink(name)
        if sink is None:
            raise ApiError(
                409, f"stream {name!r} has a source of its own; create one with source 'push' to send frames"
            )
        return sink

    # --- questions

    @cached_property
    def prompt_limit(self) -> PromptLimit:
        """The limit on a question's length."""
        found = load_text(self.model)
        if found is None:
            from flash_vstream.models import hub

            return PromptLimit(*hub.load_processor(self.model))
        return PromptLimit(*found)

    def ask(
        self,
        stream: str | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        clip: str | None = None,
    ) -> Answering:
        """Start a question; logs it at once, and again with its outcome when it ends.

        ``clip`` names one of ``clips`` instead of a ``stream``. The caller must close the result or iterate it to its
        end. Raises ``ApiError`` if the question cannot be accepted: 404 or 409 for the stream, 422 for the text, 429
        if too many questions are in progress; ``PromptTooLongError`` if it does not fit the model.
        """
        shared = self.shared(stream).path if stream is not None else None
        if clip is not None:
            shared = self.live.shared_state(clip).path
        for text in (question, *(text for turn in history for text in turn)):
            try:
                plain_text(text)
            except ValueError as error:
                raise ApiError(422, f"the question: {error}") from None
        if not question.strip():
            raise ApiError(422, "the question is empty; write what you want to know")
        self.prompt_limit.check(question, history, max_new_tokens)
        if not self._questions.begin():
            raise ApiError(
                429, f"{self.limits.questions_at_once} questions are in progress, the maximum; try again in a moment"
            )
        try:
            number = self.store.ask(stream or "", question)
        except BaseException:
            self._questions.end()
            raise

        def finish(answer: str | None, error: str | None, details: dict[str, Any]) -> None:
            self._questions.end()
            self.store.answer(number, answer, error, details)
            self.metrics.answered(details, error)

        return Answering(self.question_client.ask(shared, question, history, max_new_tokens, stop), number, finish)

    def history(self, name: str, limit: int, before: int | None = None) -> list[dict[str, Any]]:
        """Questions about a stream, oldest first, with the pictures its memory still has."""
        self.check_stream(name)
        entries = self.store.history(name, limit, before)
        shared = self._shared_state(name)
        pictures = read_thumbnails(shared) if shared is not None else {}
        for slot in (slot for entry in entries for slot in entry["details"].get("evidence", ())):
            if (picture := pictures.get(slot["exemplar"])) is not None:
                slot["thumbnail"] = data_url(picture)
        return entries

    # --- saving

    def save(self) -> None:
        """Write every stream's memory and retry failed writes; raises ``StoreError``."""
        failed: StoreError | None = None
        for name in self.stream_names():
            with self._changing, suppress(UserError):  # removed in the meantime
                path, shared = self.store.memory_path(name), self._shared_state(name)
                if path is not None and shared is not None:
                    try:
                        _save(shared, path)
                    except StoreError as error:  # still save the other streams
                        failed = error
        self.store.flush()
        self.watches.save()
        if self._far is not None:
            self._far.upload()
        if failed is not None:
            raise failed

    def _save_often(self) -> None:
        while not self._stopping.wait(SAVE_SECONDS):
            self._save_now()
            with self._changing:
                for saved in list(self._waiting.values()):
                    self._watch_saved(saved)

    def _save_now(self) -> None:
        """Save; ``problems`` reports an error until saving works again."""
        try:
            self.save()
        except Exception as error:  # of any kind: this thread must survive, and the next try may succeed
            self.saving_error = str(error)
            log.error("memories could not be saved", extra={"reason": str(error)})
        else:
            self.saving_error = None

    def close(self) -> None:
        """Save, and stop every process."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._saver.is_alive():
            self._saver.join(timeout=5)
        self._save_now()
        self.recorder.close()
        self.question_client.close()
        self.live.close()
        self.watches.close()
        self.descriptions.transcript.close()
        self.store.close()
        self.clips.close()
        self.alert_clips.close()
        self._scratch.cleanup()
        if self._far is not None:
            self._far.close()


def _failed(waiting: SavedStream) -> StreamStatus:
    """The status of a saved stream that could not be started."""
    fields = waiting.fields or {"name": "", "fps": 1.0}
    shown, fps = hide_secrets(str(fields["name"])), fields.get("fps", 1.0)
    return StreamStatus(name=waiting.name, source=shown, state="failed", fps=fps, error=waiting.error)


def _save(shared: PublishedState, path: Path) -> bool:
    """``save_state``, with any error raised as ``StoreError`` (safetensors' errors are not ``OSError``)."""
    try:
        return save_state(shared, path)
    except Exception as error:
        raise StoreError(str(error)) from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn a ``StoreError`` into an ``ApiError`` (409) for the caller."""
    try:
        yield
    except StoreError as error:
        log.error("the state folder cannot be written", extra={"reason": str(error)})
        raise ApiError(409, f"the state folder cannot be written ({error}); nothing was changed") from None
