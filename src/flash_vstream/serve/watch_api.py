"""Watches, alerts and the transcript over HTTP; what is new as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Header, Path, Query, Request, Response
from sse_starlette import EventSourceResponse

from flash_vstream.errors import UserError
from flash_vstream.serve import schemas
from flash_vstream.serve.alert_store import AlertStore
from flash_vstream.serve.answers import PING_SECONDS, SEND_SECONDS
from flash_vstream.serve.security import ApiError
from flash_vstream.serve.service import Service
from flash_vstream.serve.transcript import Transcript

POLL_SECONDS = 0.1
AT_ONCE = 100
Name = Annotated[str, Path(max_length=64, description="The stream's name.")]
WatchId = Annotated[str, Path(max_length=64, description="The watch's id.")]


def add_watches(app: FastAPI, service: Service) -> None:
    """Add the routes of watches and alerts; event streams end when ``app.state.ending()`` becomes true."""
    watches = service.watches

    @app.post("/v1/streams/{name}/watches", tags=["watches"], status_code=201, response_model=schemas.WatchInfo)
    def create_watch(name: Name, new: schemas.NewWatch) -> dict[str, Any]:
        """Ask to be told of an event."""
        with service.changing(name):
            return watches.add(name, new.model_dump(exclude={"id"}), new.id)

    @app.get("/v1/streams/{name}/watches", tags=["watches"], response_model=list[schemas.WatchInfo])
    def list_watches(name: Name) -> list[dict[str, Any]]:
        """A stream's watches and what they have seen."""
        service.check_stream(name)
        return watches.list(name)

    @app.get("/v1/streams/{name}/watches/{watch}", tags=["watches"], response_model=schemas.WatchInfo)
    def inspect_watch(name: Name, watch: WatchId) -> dict[str, Any]:
        """A watch and what it has seen."""
        service.check_stream(name)
        return watches.get(name, watch)

    @app.patch("/v1/streams/{name}/watches/{watch}", tags=["watches"], response_model=schemas.WatchInfo)
    def edit_watch(name: Name, watch: WatchId, edit: schemas.WatchEdit) -> dict[str, Any]:
        """Change a watch, pause it, or let it go on."""
        with service.changing(name):
            return watches.edit(name, watch, edit.model_dump(exclude_unset=True))

    @app.delete("/v1/streams/{name}/watches/{watch}", tags=["watches"], status_code=204)
    def delete_watch(name: Name, watch: WatchId) -> None:
        """Delete a watch; its past alerts are kept."""
        with service.changing(name):
            watches.remove(name, watch)

    @app.get("/v1/streams/{name}/alerts", tags=["watches"], response_model=list[schemas.AlertInfo])
    def list_alerts(
        name: Name,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Annotated[str | None, Query(max_length=64, description="Alerts older than this id.")] = None,
    ) -> list[dict[str, Any]]:
        """A stream's alerts, oldest first."""
        service.check_stream(name)
        return [alert.to_dict() for alert in watches.store.alerts(name, limit, before)]

    @app.get("/v1/alerts/events", tags=["watches"], response_class=Response)
    def alert_events(
        request: Request,
        stream: Annotated[str | None, Query(max_length=64, description="Only this stream's alerts.")] = None,
        last_event_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Alerts as server-sent events (``alert``) as they happen, of one stream or all.

        Each has the alert's id; a caller that sends the last one it saw as ``Last-Event-ID`` misses none.
        """
        if stream is not None:
            service.check_stream(stream)
        number = watches.store.newest
        if last_event_id:
            known = watches.store.number_of(last_event_id)
            number = known if known is not None else 0  # too old to be known: all that are kept
        return _sent(_events(service, stream, number, request.app.state.ending))

    @app.get("/v1/alerts/{alert}/picture", tags=["watches"], response_class=Response)
    def alert_picture(alert: Annotated[str, Path(max_length=64)]) -> Response:
        """The frame of an alert as JPEG."""
        picture = watches.store.picture(alert)
        if picture is None:
            raise ApiError(404, f"there is no picture of an alert {alert!r}")
        return Response(picture, media_type="image/jpeg")

    @app.get("/v1/alerts/{alert}/clip", tags=["watches"], response_class=Response)
    async def alert_clip(alert: Annotated[str, Path(max_length=64)], request: Request) -> Response:
        """The recorded seconds around an alert as MP4; the answer waits until those after it are there.

        ``X-Stream-Time`` is the stream time at which the clip begins. ``Range`` is honoured.
        """
        told = await anyio.to_thread.run_sync(watches.store.alert, alert)
        if told is None:
            raise ApiError(404, f"there is no alert {alert!r}")
        return await service.alert_clips.response(told, request.app.state.ending)

    @app.get("/v1/streams/{name}/transcript", tags=["watches"], response_model=list[schemas.Caption])
    def transcript(
        name: Name,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Annotated[int | None, Query(ge=1, le=2**62, description="Captions older than this id.")] = None,
        q: Annotated[str, Query(max_length=200, description="Only captions with all of these words.")] = "",
    ) -> list[dict[str, Any]]:
        """What was said of a stream while the server describes streams (``--describe``), oldest first."""
        service.check_stream(name)
        found = service.descriptions.transcript.captions(name, limit, before, words=q)
        return [caption.to_dict() for caption in found]

    @app.get("/v1/streams/{name}/transcript/events", tags=["watches"], response_class=Response)
    def transcript_events(
        request: Request,
        name: Name,
        last_event_id: Annotated[str | None, Header(max_length=20, pattern=r"^\d+$")] = None,
    ) -> Response:
        """Captions as server-sent events (``caption``) as they are said; ``Last-Event-ID`` continues after one."""
        service.check_stream(name)
        number = int(last_event_id) if last_event_id else service.descriptions.transcript.newest
        return _sent(_captions(service, name, number, request.app.state.ending))


def _sent(events: AsyncIterator[dict[str, str]]) -> Response:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return EventSourceResponse(events, ping=PING_SECONDS, sep="\n", headers=headers, send_timeout=SEND_SECONDS)


def _captions(service: Service, stream: str, number: int, ending: Callable[[], bool]) -> AsyncIterator[dict[str, str]]:
    """A stream's captions after the one with the id ``number``, without end."""
    transcript = service.descriptions.transcript
    return _following("caption", transcript, partial(transcript.captions, stream, AT_ONCE), number, "id", ending)


def _events(
    service: Service, stream: str | None, number: int, ending: Callable[[], bool]
) -> AsyncIterator[dict[str, str]]:
    """Alerts after the one with ``number``, without end."""
    store = service.watches.store
    return _following("alert", store, partial(store.alerts, stream, AT_ONCE), number, "number", ending)


async def _following(
    kind: str,
    store: AlertStore | Transcript,
    read: Callable[..., list[Any]],
    number: int,
    counted_by: str,
    ending: Callable[[], bool],
) -> AsyncIterator[dict[str, str]]:
    """What a store gets after the entry with ``number`` (its attribute ``counted_by``), as events of a ``kind``."""
    while not ending():
        if store.newest > number:
            newest = store.newest
            try:
                entries = await anyio.to_thread.run_sync(partial(read, after=number))
            except UserError:  # the database cannot be read, which is logged; a caller that comes back misses nothing
                return
            for entry in entries:
                yield {"event": kind, "id": str(entry.id), "data": json.dumps(entry.to_dict())}
            number = getattr(entries[-1], counted_by) if len(entries) == AT_ONCE else newest
        await asyncio.sleep(POLL_SECONDS)
