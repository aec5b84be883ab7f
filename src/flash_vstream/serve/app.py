"""The application: REST for streams and questions, and the web page."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated, Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Path, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.live.published import read_memory_table, read_picture
from flash_vstream.live.question_client import Event
from flash_vstream.live.streams import StreamStatus
from flash_vstream.serve import schemas
from flash_vstream.serve.answers import Answers, AnswerStream, while_connected
from flash_vstream.serve.chat import add_chat
from flash_vstream.serve.live_pictures import add_live_pictures
from flash_vstream.serve.middleware import add_middleware, encoded_error
from flash_vstream.serve.security import ApiError
from flash_vstream.serve.service import Service
from flash_vstream.serve.watch_api import add_watches
from flash_vstream.video import Frame
from flash_vstream.video.pictures import centre_and_whole, data_url
from flash_vstream.video.sources import Source

THREADS = 128
"""Each answer in progress occupies a thread while it waits for its next token."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": what}
    for status, what in (
        (400, "Not understood"),
        (401, "A token is needed"),
        (403, "Not allowed"),
        (404, "No such stream"),
        (409, "Not possible in this state"),
        (413, "Too large"),
        (422, "Not valid"),
        (429, "Too many"),
    )
}
Name = Annotated[str, Path(max_length=64, description="The stream's name.")]


def make_app(service: Service) -> FastAPI:
    """The ASGI application for ``service``; closes the service on shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(title="flash-vstream", version=__version__, lifespan=lifespan, responses=_ERRORS, docs_url=None)
    app.state.ending = lambda: False  # replaced by whoever runs the server
    add_middleware(app, service.access, service.limits.json_bytes, service.limits.upload_bytes)
    _add_errors(app)
    _add_state(app, service)
    _add_streams(app, service)
    answers = Answers(service)
    _add_questions(app, service, answers)
    _add_push(app, service, answers.decoding)
    add_live_pictures(app, service)
    add_watches(app, service)
    add_chat(app, service, answers)
    page = files("flash_vstream.serve") / "page"
    app.mount("/page", StaticFiles(directory=str(page)), name="page")

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return Response((page / "index.html").read_bytes(), media_type="text/html")

    return app


def _add_errors(app: FastAPI) -> None:
    def response(status: int, message: str, headers: Any = None) -> Response:
        return Response(encoded_error(status, message), status, headers, "application/json")

    def refused(_: Request, error: Exception) -> Response:
        return response(error.status if isinstance(error, ApiError) else 422, str(error))

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return response(422, f"{where[:200]}: {first['msg']}")

    def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return response(error.status_code, str(error.detail), error.headers)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"], response_model=schemas.Health)
    def health() -> dict[str, Any]:
        """Whether the server is healthy, and any problems."""
        workers = {name: worker.to_dict() for name, worker in service.workers().items()}
        problems = service.problems()
        status = "degraded" if problems else "ok"
        if not all(worker["alive"] for worker in workers.values()):
            status = "restarting"
        return {"status": status, "problems": problems, "workers": workers, "uptime_seconds": service.uptime}

    @app.get("/metrics", tags=["server"], response_class=Response)
    def metrics() -> Response:
        """Counters, lag and timings in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_streams(app: FastAPI, service: Service) -> None:
    @app.get("/v1/streams", tags=["streams"], response_model=list[schemas.StreamInfo])
    def list_streams() -> list[dict[str, Any]]:
        """Every stream's status."""
        return [_info(service, status) for status in service.statuses()]

    @app.post("/v1/streams", tags=["streams"], status_code=201, response_model=schemas.StreamInfo)
    def create_stream(new: schemas.NewStream) -> dict[str, Any]:
        """Start watching a source."""
        # Checked first: whether a forbidden file exists must not leak.
        service.access.check_source(new.source, new.transport)
        source = Source(
            new.source, new.fps, pace=new.pace, loop=new.loop, transport=new.transport, record=new.record
        ).checked()
        service.add_stream(new.name, source)
        return _info(service, service.status(new.name))

    @app.get("/v1/streams/{name}", tags=["streams"], response_model=schemas.StreamInfo)
    def inspect_stream(name: Name) -> dict[str, Any]:
        """A stream's status."""
        return _info(service, service.status(name))

    @app.patch("/v1/streams/{name}", tags=["streams"], response_model=schemas.StreamInfo)
    def edit_stream(name: Name, edit: schemas.StreamEdit) -> dict[str, Any]:
        """Change a stream's name, frame rate or whether it is recorded; keep its memory and history."""
        service.edit_stream(name, edit.name, edit.fps, edit.record)
        return _info(service, service.status(edit.name or name))

    @app.delete("/v1/streams/{name}", tags=["streams"], status_code=204)
    def delete_stream(name: Name) -> None:
        """Stop watching, and delete the memory, history and recording."""
        service.remove_stream(name)

    @app.get("/v1/streams/{name}/memory", tags=["streams"], response_model=schemas.Memory)
    def memory(
        name: Name,
        thumbnails_after: Annotated[
            float,
            Query(
                description="Only include pictures of frames after this stream time; for callers that have the others."
            ),
        ] = -1.0,
    ) -> dict[str, Any]:
        """The memory's slots, oldest part first, with the times and pictures of their frames."""
        table = read_memory_table(service.shared(name))
        pictures = {at: data_url(jpeg) for at, jpeg in table.thumbnails.items() if at > thumbnails_after}
        slots = [{**slot.to_dict(), "thumbnail": pictures.get(slot.exemplar)} for slot in table.slots]
        held = {"slots": slots, "longterm": table.longterm}
        return {"time": table.time, "frames": table.frames, "capacity": service.live.capacity, **held}

    @app.get("/v1/streams/{name}/picture", tags=["streams"], response_class=Response)
    def picture(name: Name) -> Response:
        """The newest frame as JPEG, whole: the model sees its centre square."""
        shown = read_picture(service.shared(name))
        if shown is None:
            raise ApiError(409, f"stream {name!r} has no picture yet; ask again in a moment")
        return Response(shown.jpeg, media_type="image/jpeg", headers={"cache-control": "no-store"})


def _info(service: Service, status: StreamStatus) -> dict[str, Any]:
    return {**status.to_dict(), "recorded": service.recorder.records(status.name)}


def _add_questions(app: FastAPI, service: Service, answers: Answers) -> None:
    @app.post("/v1/streams/{name}/questions", tags=["questions"], response_model=schemas.AnswerBody)
    async def ask(name: Name, new: schemas.NewQuestion, request: Request) -> Any:
        """Ask about the stream now; with ``stream`` the events are ``text``, then ``done`` or ``error``."""
        answer = await answers.ask(name, new.question, new.max_new_tokens)
        if new.stream:
            return AnswerStream(answer, _messages)
        return await while_connected(request, answer.finished())

    @app.get("/v1/streams/{name}/history", tags=["questions"], response_model=list[schemas.HistoryEntry])
    def history(
        name: Name,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Annotated[int | None, Query(ge=1, le=2**62, description="Questions older than this id.")] = None,
    ) -> list[dict[str, Any]]:
        """Questions with their outcomes, oldest first."""
        return service.history(name, limit, before)


async def _messages(events: AsyncIterator[Event]) -> AsyncIterator[dict[str, str]]:
    async for event in events:
        value = event.value if event.kind == "done" else {"text" if event.kind == "text" else "message": event.value}
        yield {"event": event.kind, "data": json.dumps(value)}


def _add_push(app: FastAPI, service: Service, decoding: anyio.CapacityLimiter) -> None:
    @app.websocket("/v1/streams/{name}/frames")
    async def push(socket: WebSocket, name: str) -> None:
        """Accept frames (JPEG, PNG or WebP, one per message) for a stream whose source is ``push``.

        Each is acknowledged with ``{"frame": number}``, so that the sender can match its pace.
        """
        try:
            source, sink = service.live.source(name), service.sink(name)
        except (ApiError, UserError) as error:
            await socket.close(1008, str(error)[:120])
            return
        await socket.accept()
        number = sink.taken
        with contextlib.suppress(WebSocketDisconnect):  # the sender left
            while _is_watched(service, name, source):
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                data = message.get("bytes") or b""
                try:
                    image, whole = await anyio.to_thread.run_sync(
                        pictures_of, data, source.size, service.limits.frame_bytes, limiter=decoding
                    )
                    number = max(number, sink.taken) + 1
                    # In a thread, since the frame may go to another machine.
                    await anyio.to_thread.run_sync(sink.write, number, Frame(time.monotonic(), image, whole))
                except (ApiError, UserError) as error:
                    await socket.send_json({"error": str(error)})
                    continue
                await socket.send_json({"frame": number})
            await socket.close(1001, "the stream was changed or deleted")


def _is_watched(service: Service, name: str, source: Source) -> bool:
    """Whether the stream called ``name`` is still the one created with ``source``."""
    with contextlib.suppress(UserError):
        return service.live.source(name) is source
    return False


def pictures_of(data: bytes, side: int, most: int) -> tuple[np.ndarray, bytes]:
    """An encoded picture's centre ``[side, side, 3]`` uint8, and a JPEG of the whole; raises ``ApiError``."""
    if len(data) > most:
        raise ApiError(413, f"the frame is {len(data):,} bytes; the limit is {most:,}")
    try:
        return centre_and_whole(data, side)
    except UserError as error:
        raise ApiError(422, f"the frame cannot be taken: {error}") from None
