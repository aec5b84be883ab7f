"""The server's middleware, one class per concern.

From the outside in: the request log, security headers, draining of unread bodies, gzip and CORS (both Starlette's),
HEAD, access checks, and limits on bodies. ``add_middleware`` wraps an application in this order.
"""

import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

import anyio
from fastapi import FastAPI, HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flash_vstream.serve.security import AccessRules, ApiError

OPEN = ("/", "/healthz")
"""Paths served without a token: the page asks the user for one, and a health check needs none."""
UPLOADS = ("/v1/chat/completions", "/v1/responses")
"""Paths whose bodies may carry clips and pictures as data URLs."""
MOST_JSON_MARKS = 50_000
"""Limit on brackets, braces and commas in a body: parsing cost grows with them, and data URLs have almost none."""
READ_SECONDS = 10.0
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' ws: wss:;"
        " frame-ancestors 'none'"
    ),
}
log = logging.getLogger("flash_vstream.serve")


def add_middleware(app: FastAPI, access: AccessRules, json_bytes: int, upload_bytes: int) -> None:
    """Wrap ``app`` in all the middleware."""
    app.add_middleware(BodyLimit, json_bytes=json_bytes, upload_bytes=upload_bytes)
    app.add_middleware(CallerCheck, access=access)
    app.add_middleware(HeadAsGet)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    streamed = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "multipart/*")  # must not be buffered
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=5, exclude_content_types=streamed)
    app.add_middleware(ReadToEnd)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLog)


class RequestLog:
    """Logs one line per request, without its query or body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            milliseconds = round(1000 * (time.perf_counter() - started), 1)
            fields = {"method": scope.get("method", "WS"), "path": scope["path"], "status": status}
            log.info("request", extra={**fields, "ms": milliseconds})


class SecurityHeaders:
    """Adds headers that stop browsers from sniffing types, leaking referrers and embedding this server's content."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)


class ReadToEnd:
    """Reads the rest of a body after a response that did not need it.

    Otherwise callers that send everything before reading would get a reset connection instead of the response.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        more = True

        async def reading() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body") and more:
                await send({**message, "more_body": True})
                with anyio.move_on_after(READ_SECONDS):
                    while more:
                        await reading()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, reading, answer)


class HeadAsGet:
    """Answers HEAD wherever GET works: the same headers, without the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, answer)


class CallerCheck:
    """Rejects callers without a token, pages of other origins and DNS-rebound hosts, according to ``access``."""

    def __init__(self, app: ASGIApp, access: AccessRules):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except ApiError as error:
                await _refuse(scope, error, send)
                return
            except ValueError:
                await _refuse(scope, ApiError(400, "the Host or the Origin header cannot be read"), send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return
        headers = Headers(scope=scope)
        # CORS does not cover a picture or WebSocket embedded in a foreign page, and a picture has no Origin
        # header; but browsers send Sec-Fetch-Site. Other ports of this machine count as "same-site".
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and headers.get("origin") not in self.access.origins:
            raise ApiError(403, "pages of other origins may not call this server; allow one with --allow-origin")
        token = None
        if scope["type"] == "websocket":  # browsers cannot set headers on these
            token = next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("token", [])), None)
        self.access.check_caller(headers, token)


class BodyLimit:
    """Limits the size of a body, with or without a Content-Length, and the number of JSON values in it."""

    def __init__(self, app: ASGIApp, json_bytes: int, upload_bytes: int):
        self.app, self.json_bytes, self.upload_bytes = app, json_bytes, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.upload_bytes if scope["path"] in UPLOADS else self.json_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > most:
            await _refuse(scope, ApiError(413, _too_large(most)), send)
            return
        size = marks = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal size, marks
            message = await receive()
            body = message.get("body", b"")
            size += len(body)
            marks += sum(map(body.count, b"[{,"))
            # HTTPException, since FastAPI turns any other exception raised while reading a body into a 400.
            if size > most:
                raise HTTPException(413, _too_large(most))
            if marks > MOST_JSON_MARKS:
                raise HTTPException(413, f"the body holds more than {MOST_JSON_MARKS:,} values")
            return message

        await self.app(scope, bounded, send)


def _too_large(most: int) -> str:
    return f"the body is longer than {most:,} bytes, the limit here"


async def _refuse(scope: Scope, error: ApiError, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
        return
    body = encoded_error(error.status, str(error))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str) -> dict[str, Any]:
    """The format of every error, which OpenAI's clients can read too."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found", 409: "conflict"}
    kinds |= {413: "too_large", 429: "rate_limit"}
    return {"error": {"message": message, "type": kinds.get(status, "invalid_request"), "code": status}}


def encoded_error(status: int, message: str) -> bytes:
    """``error_body`` as ASCII JSON, since a message may quote text that cannot be encoded, such as a lone surrogate."""
    return json.dumps(error_body(status, message)).encode()
