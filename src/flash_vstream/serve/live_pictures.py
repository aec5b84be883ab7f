"""A stream's pictures as motion JPEG: every new frame is sent as it arrives.

Browsers, VLC, FFmpeg and home automation software play ``multipart/x-mixed-replace`` directly. The
pictures are whole frames, at most 640 pixels a side; the model sees their centre squares.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import anyio
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import StreamingResponse

from flash_vstream.errors import UserError
from flash_vstream.live.published import read_picture
from flash_vstream.serve.security import ApiError
from flash_vstream.serve.service import Service

BOUNDARY = "frame"
POLL_SECONDS = 0.04
REPEAT_SECONDS = 15.0
"""Without a new frame for this long, the last one is sent again, so that proxies keep the connection open."""


def add_live_pictures(app: FastAPI, service: Service) -> None:
    """Add ``GET /v1/streams/{name}/live``, whose response ends when ``app.state.ending()`` becomes true."""

    @app.get("/v1/streams/{name}/live", tags=["streams"], response_class=Response)
    async def live_pictures(
        name: Annotated[str, Path(max_length=64, description="The stream's name.")], request: Request
    ) -> StreamingResponse:
        """New frames, whole, as motion JPEG until the stream ends, fails or is deleted.

        Each part has the frame's ``X-Stream-Time`` in seconds.
        """
        service.check_stream(name)
        return StreamingResponse(
            _parts(service, name, request.app.state.ending),
            media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}",
            headers={"cache-control": "no-store"},
        )


async def _parts(service: Service, name: str, ending: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Each picture with its headers and the next boundary, which makes players show it at once."""
    yield f"--{BOUNDARY}\r\n".encode()
    shown, sent = -1, 0.0
    while not ending():
        try:
            status = service.status(name)
            repeat = time.monotonic() - sent > REPEAT_SECONDS
            picture = None
            # Fewer frames than before are kept once a memory was lost. Read in a thread: it may be on another machine.
            if status.time is not None and (status.kept != shown or repeat):
                picture = await anyio.to_thread.run_sync(read_picture, service.shared(name))
        except (ApiError, UserError):  # deleted
            return
        if picture is not None and (picture.kept != shown or repeat):
            shown, sent = picture.kept, time.monotonic()
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture.jpeg)}\r\n"
            head += f"X-Stream-Time: {picture.time}\r\n\r\n"
            yield head.encode() + picture.jpeg + f"\r\n--{BOUNDARY}\r\n".encode()
        if status.state in ("ended", "failed"):
            return
        await asyncio.sleep(POLL_SECONDS)
