"""Answers in progress and the resources they hold, released as soon as the caller disconnects."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from flash_vstream.errors import UserError
from flash_vstream.live.question_client import Event
from flash_vstream.serve.answering import Answering
from flash_vstream.serve.conversation import Conversation, RequestError, data_of
from flash_vstream.serve.fetching import Fetcher
from flash_vstream.serve.security import ApiError
from flash_vstream.serve.service import Service
from flash_vstream.video.network import parse_url
from flash_vstream.video.pictures import decode_picture

PICTURE_SIDE = 512
DECODED_AT_ONCE = 2
"""Pictures of callers decoded at once, those of chats and pushed frames together: each may take 48 MB and more."""
PING_SECONDS = 15
"""How often a silent event stream gets a comment, so that proxies keep the connection open."""
SEND_SECONDS = 30.0
"""How long a caller may stop reading before the connection is closed."""
log = logging.getLogger("flash_vstream.serve")
GONE = ApiError(499, "the caller is gone")
T = TypeVar("T")


class Answers:
    """Starts answers: fetches and watches the media of a conversation, and releases it again on failure."""

    def __init__(self, service: Service):
        self.service = service
        self._fetcher = Fetcher(service.access.rules, service.limits.upload_bytes)
        self._waiting = anyio.CapacityLimiter(service.limits.questions_at_once)
        self.decoding = anyio.CapacityLimiter(DECODED_AT_ONCE)

    async def begin(
        self, conversation: Conversation, fps: float, max_tokens: int, stop: Sequence[str] = ()
    ) -> "OngoingAnswer":
        """Ask a conversation's question; raises ``ApiError`` or ``UserError`` if it cannot be asked."""
        service = self.service
        question, history = conversation.question, conversation.history
        # Checked before anything is fetched or watched.
        await anyio.to_thread.run_sync(service.prompt_limit.check, question, history, max_tokens)
        stream = None
        if conversation.video is not None and conversation.video.startswith("stream:"):
            stream = conversation.video.removeprefix("stream:")
            service.check_stream(stream)
        clip = None
        try:
            if stream is None and (conversation.video is not None or conversation.pictures):
                media = await self._media(conversation)
                clip = await anyio.to_thread.run_sync(service.clips.add, media, fps)
                await service.clips.watched(clip)
            events = await anyio.to_thread.run_sync(
                lambda: service.ask(stream, question, history, max_tokens, stop, clip)
            )
        except BaseException:
            if clip is not None:
                await _shielded(service.clips.remove, clip)
            raise
        return OngoingAnswer(service, events, clip, self._waiting)

    async def ask(self, stream: str, question: str, max_new_tokens: int) -> "OngoingAnswer":
        """Ask about a stream; raises ``ApiError`` or ``UserError`` if it cannot be asked."""
        events = await anyio.to_thread.run_sync(lambda: self.service.ask(stream, question, (), max_new_tokens))
        return OngoingAnswer(self.service, events, None, self._waiting)

    async def _media(self, conversation: Conversation) -> Any:
        """A conversation's media: the bytes of a video, or a list of decoded pictures."""
        if conversation.video is not None:
            data = await self._bytes_of(conversation.video)
            is_picture = data[:2] == b"\xff\xd8" or data[:4] == b"\x89PNG" or (data[:4] + data[8:12]) == b"RIFFWEBP"
            return [await self._picture(data, "the video_url")] if is_picture else data
        pictures = []
        for i, url in enumerate(conversation.pictures, 1):
            if url.startswith("stream:"):
                raise RequestError("a stream is named by a part of type video_url", "messages")
            pictures.append(await self._picture(await self._bytes_of(url), f"picture {i}"))
        return pictures

    async def _picture(self, data: bytes, what: str) -> Any:
        try:
            return await anyio.to_thread.run_sync(decode_picture, data, PICTURE_SIDE, limiter=self.decoding)
        except UserError as error:
            raise RequestError(f"{what} cannot be read: {error}", "messages", "invalid_image") from None

    async def _bytes_of(self, url: str) -> bytes:
        data = await anyio.to_thread.run_sync(data_of, url)
        if data is None:
            if not url[:8].lower().startswith(("http://", "https://")):
                raise RequestError("media are named by stream:NAME, a data: URL, or an http(s) URL", "messages")
            parse_url(url)
            data = await self._fetcher.fetch(url)
        if not data:
            raise RequestError("the clip is empty", "messages")
        return data


class OngoingAnswer:
    """An answer's events as an async iterator; closing it ends the question and deletes its clip."""

    def __init__(self, service: Service, events: Answering, clip: str | None, limiter: anyio.CapacityLimiter):
        self._service, self._events, self._clip, self._limiter = service, events, clip, limiter

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they arrive; the last is ``done`` or ``error``."""
        while (event := await anyio.to_thread.run_sync(next, self._events, None, limiter=self._limiter)) is not None:
            yield event

    async def finished(self) -> dict[str, Any]:
        """The whole answer with its details; raises ``ApiError`` if it failed."""
        try:
            async for event in self:
                if event.kind == "done":
                    return dict(event.value)
                if event.kind == "error":
                    raise ApiError(409, event.value)
            raise ApiError(409, "the answer was interrupted; ask again")
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the question if it is still in progress, and delete the clip."""
        await _shielded(self._close)

    def _close(self) -> None:
        try:
            self._events.close()
        finally:
            if self._clip is not None:
                clip, self._clip = self._clip, None
                self._service.clips.remove(clip)


async def _shielded(function: Callable[..., None], *arguments: Any) -> None:
    """Run a cleanup function to completion even if the request is cancelled."""
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(function, *arguments)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``; if the caller disconnects, cancels it and raises ``ApiError`` (499)."""
    result: list[T] = []
    failed: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def cancel_on_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(cancel_on_disconnect)
        try:
            result.append(await work)
        except Exception as error:
            failed.append(error)
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]
    if not result:
        raise GONE
    return result[0]


class AnswerStream(EventSourceResponse):
    """An answer as server-sent events, which ``messages`` makes of its events; closed when the caller disconnects."""

    def __init__(self, answer: OngoingAnswer, messages: Callable[[AsyncIterator[Event]], AsyncIterator[Any]]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(
            messages(aiter(answer)), ping=PING_SECONDS, sep="\n", headers=headers, send_timeout=SEND_SECONDS
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, and release the answer's resources even if it never started."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("a caller stopped reading its answer", extra={"path": scope["path"]})
        finally:
            await self._answer.aclose()
