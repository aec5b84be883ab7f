"""Limits on slow connections, so that half-sent requests and unread responses cannot lock others out.

uvicorn limits the number of connections and closes idle ones, but does not limit how long a request takes to arrive or
a response to be read.
"""

import asyncio
import time
from collections import OrderedDict
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flash_vstream.descriptors import allow_open_files

HEAD_SECONDS = 15.0
BODY_SECONDS = 120.0
"""How long a request's head, and then its body, may take to arrive; 64 MiB in two minutes are 4.5 Mbit/s."""
SEND_SECONDS = 30.0
"""How long a caller may read nothing while the response waits for it."""
MOST_ARRIVING, GRACE_SECONDS = 512, 1.0
"""Requests that may be arriving at once; beyond that the oldest is dropped once it has had a second."""
HEADROOM = 256
"""File descriptors reserved for everything but connections: workers, shared states, the database."""


def connection_limit() -> int:
    """Raise the limit on file descriptors as far as allowed, and return the maximum number of connections."""
    return max(16, min(4096, allow_open_files() - HEADROOM))


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits on how long a request may take to arrive, and a response may wait unread."""

    head_seconds, body_seconds, send_seconds = HEAD_SECONDS, BODY_SECONDS, SEND_SECONDS
    most_arriving, grace_seconds = MOST_ARRIVING, GRACE_SECONDS
    arriving: "OrderedDict[PatientProtocol, asyncio.TimerHandle]" = OrderedDict()
    _phase: Any = None
    _since = 0.0
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._note()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Closing would wait until the rest has been sent.
        self._unread = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_unread()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._forget_unread()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._forget()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        """Start the timer when a phase (head or body) begins, and stop it when the phase ends."""
        phase: Any = self.conn.their_state
        idle = phase is h11.IDLE and self.timeout_keep_alive_task is not None  # uvicorn closes it
        if idle or phase not in (h11.IDLE, h11.SEND_BODY):
            self._forget()
        elif phase is not self._phase:
            self._forget()
            self._phase, self._since = phase, time.monotonic()
            seconds = self.head_seconds if phase is h11.IDLE else self.body_seconds
            self.arriving[self] = self.loop.call_later(seconds, self._give_up)
            self._make_room()

    def _make_room(self) -> None:
        while len(self.arriving) > self.most_arriving:
            oldest = next(iter(self.arriving))
            if time.monotonic() - oldest._since < self.grace_seconds:
                return  # in a burst of connections, the oldest may be honest
            oldest._give_up()

    def _forget(self) -> None:
        self._phase = None
        if (timer := self.arriving.pop(self, None)) is not None:
            timer.cancel()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _give_up(self) -> None:
        self._forget()
        self.transport.abort()
