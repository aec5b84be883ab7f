"""Answers over HTTP: as server-sent events, or whole. Either way the question ends when its caller leaves."""

import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import anyio
import anyio.to_thread
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.concurrency import iterate_in_threadpool
from starlette.types import Receive, Scope, Send

from flash_vstream.live.question_client import Event
from flash_vstream.serve.answering import Answering
from flash_vstream.serve.security import ApiError

KEEP_ALIVE_SECONDS = 15
SEND_SECONDS = 30.0
"""How long a caller may stop reading before the connection is closed."""
log = logging.getLogger("flash_vstream.serve")


class AnswerStream(EventSourceResponse):
    """An answer as server-sent events, ``messages`` made of the events of ``answering``.

    While no event comes, a comment every 15 s keeps proxies from closing the connection. ``answering``
    is closed when the response ends, even if nothing of it was sent: the caller may have left, or stopped reading.
    """

    def __init__(self, answering: Answering, messages: Iterable[ServerSentEvent]):
        self._answering = answering
        headers = {"cache-control": "no-cache"}
        super().__init__(
            _pulled(messages), headers=headers, ping=KEEP_ALIVE_SECONDS, sep="\n", send_timeout=SEND_SECONDS
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("a caller stopped reading its answer", extra={"path": scope["path"]})
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._answering.close)


def server_sent(value: Any, event: str | None = None) -> ServerSentEvent:
    """``value`` as JSON in a server-sent event; text that is sent as it is may be given as ``bytes``."""
    data = value.decode() if isinstance(value, bytes) else json.dumps(value)
    return ServerSentEvent(data, event=event, sep="\n")


async def _pulled(messages: Iterable[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    async for message in iterate_in_threadpool(messages):
        yield message


async def whole_answer(answering: Answering, receive: Receive) -> dict[str, Any]:
    """The answer with all its details; stops when the caller leaves.

    ``receive`` is the request's, whose body has been read. Raises ``ApiError`` (409) when there is no answer.
    """
    last: Event | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_when_gone, answering, receive)
        try:
            last = await anyio.to_thread.run_sync(last_event, answering)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(answering.close)
            group.cancel_scope.cancel()
    if last is None or last.kind == "text":
        raise ApiError(409, "the answer broke off; ask again")
    if last.kind == "error":
        raise ApiError(409, last.value)
    return dict(last.value)


def last_event(events: Iterator[Event]) -> Event | None:
    """The last of an answer's events: done or error, unless it was cancelled."""
    last = None
    for event in events:
        last = event
    return last


async def _cancel_when_gone(answering: Answering, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()
