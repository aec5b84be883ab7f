"""What stands before every request: who may call, how much may be sent, one line of log each."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from flash_vstream.serve.security import AccessRules, ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/healthz")
"""Answered without a token: the page asks for one, and a health check needs none."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    ),
]
log = logging.getLogger("flash_vstream.serve")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, access: AccessRules, most_bytes: int):
        self.app, self.access, self.most_bytes = app, access, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        begun, seen = time.perf_counter(), {"status": 0}

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._bounded(receive) if scope["type"] == "http" else receive, answer)
        except ApiError as refused:
            if seen["status"]:
                raise  # too late to say it
            await _refuse(scope, refused, answer)
        finally:
            taken = round(1000 * (time.perf_counter() - begun), 1)
            method = scope.get("method", "WS")
            log.info("request", extra={"method": method, "path": scope["path"], "status": seen["status"], "ms": taken})

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return
        token = None
        if scope["type"] == "websocket":  # browsers send no headers of ours with these
            token = next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("token", [])), None)
        self.access.check_caller(headers, token)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.most_bytes:
            raise ApiError(413, f"the body is {int(length):,} bytes; {self.most_bytes:,} at most are taken")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` that stops a body which is longer than it said, or did not say."""
        taken = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_bytes:
                raise ApiError(413, f"the body is longer than {self.most_bytes:,} bytes, the most that is taken")
            return message

        return bounded


async def _refuse(scope: Scope, refused: ApiError, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(refused)[:120]})
        return
    body = json.dumps(error_body(refused.status, str(refused))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str) -> dict[str, Any]:
    """The one shape of every error, which OpenAI's clients read too."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found", 409: "conflict"}
    kinds |= {413: "too_large", 429: "rate_limit"}
    return {"error": {"message": message, "type": kinds.get(status, "invalid_request"), "code": status}}
