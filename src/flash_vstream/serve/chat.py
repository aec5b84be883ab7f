"""``POST /v1/chat/completions`` in OpenAI's shape, so that its clients work unchanged.

A video is a content part of type ``video_url``: ``stream:NAME`` for a live stream as it is now, a
``data:`` URL for a clip that is sent along, or an http(s) URL of one. Parts of type ``image_url`` are
pictures; several in one message are frames, one a second.
"""

import base64
import binascii
import io
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from PIL import Image, ImageOps
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from flash_vstream.live.question_client import Event
from flash_vstream.serve import schemas
from flash_vstream.serve.answering import Answering
from flash_vstream.serve.responses import AnswerStream, server_sent, whole_answer
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.service import Service
from flash_vstream.video.writer import write_video

FETCH_SECONDS = 30.0


def add_chat(app: FastAPI, service: Service) -> None:
    """The endpoints that OpenAI's clients call."""

    @app.get("/v1/models", tags=["chat"])
    def models() -> dict[str, Any]:
        """The one model that this server runs."""
        created = int(service.started)
        model = {"id": service.model_name, "object": "model", "created": created, "owned_by": "flash-vstream"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", tags=["chat"])
    async def chat(request: schemas.ChatRequest, http: Request) -> Any:
        """Chat about a stream, a clip, or nothing; greedy whatever the sampling settings say."""
        answering = await run_in_threadpool(begin, request)
        if request.stream:
            usage = bool((request.stream_options or {}).get("include_usage"))
            return AnswerStream(answering, _chunks(service, answering, usage))
        return _completion(service, await whole_answer(answering, http.receive))

    def begin(request: schemas.ChatRequest) -> Answering:
        if request.n not in (None, 1):
            raise ApiError(400, "n must be 1; decoding is greedy, and every answer would be the same")
        if request.model != service.model_name:
            raise ApiError(404, f"the model here is {service.model_name!r}, not {request.model[:80]!r}")
        question, history, media = _conversation(request.messages)
        stream = _stream_of(service, media, request.fps) if media else None
        most = request.max_completion_tokens or request.max_tokens or 96
        return service.ask(stream, question, history, most)


def _conversation(messages: list[schemas.ChatMessage]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """The last question, the turns before it, and the media of the newest message that has any."""
    turns: list[tuple[str, str]] = []
    question = ""
    media: list[str] = []
    if messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's")
    for message in messages:
        text, named = _content(message.content)
        media = named or media
        if message.role == "user":
            question = f"{question}\n{text}".strip() if question else text
        elif message.role == "assistant" and question:
            turns.append((question, text))
            question = ""
    if len(question) > schemas.MOST_QUESTION:
        raise ApiError(
            422, f"the question has {len(question):,} characters; {schemas.MOST_QUESTION:,} at most are taken"
        )
    return question, turns[-8:], media


def _content(content: str | list[dict[str, Any]] | None) -> tuple[str, list[str]]:
    """A message's text, and the URLs of its last video or of its pictures."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    media: list[str] = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("video_url", "image_url"):
            named = part.get(kind)
            url = named.get("url") if isinstance(named, dict) else named
            if not isinstance(url, str):
                raise ApiError(400, f'a part of type {kind} needs {{"{kind}": {{"url": "…"}}}}')
            media = [*media, url] if kind == "image_url" else [url]
        else:
            raise ApiError(
                400, f"a part of type {str(kind)[:40]!r} is not understood; send text, video_url or image_url"
            )
    return "\n".join(texts), media


def _stream_of(service: Service, media: list[str], fps: float) -> str:
    """The stream that URLs name; clips are watched first, and pictures as one clip."""
    if media[-1].startswith("stream:"):
        name = media[-1].removeprefix("stream:")
        service.check_stream(name)
        return name
    if len(media) == 1:
        return service.clip(_bytes_of(service, media[0]), fps)
    file = io.BytesIO()
    write_video(file, [_picture(_bytes_of(service, url)) for url in media[:64]], 1)
    return service.clip(file.getvalue(), 1.0)


def _picture(data: bytes) -> np.ndarray:
    try:
        return np.asarray(ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (256, 256)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ApiError(422, "one of several image_url parts is not a picture") from None


def _bytes_of(service: Service, url: str) -> bytes:
    """What a URL holds; raises ``ApiError`` for one that cannot be read."""
    if url.startswith("data:"):
        _, comma, data = url.partition(",")
        try:
            clip = base64.b64decode(data, validate=True) if comma else b""
        except (binascii.Error, ValueError):
            raise ApiError(400, "the data: URL is not base64") from None
    elif url.startswith(("http://", "https://")):
        clip = fetch_clip(url, service.access, service.limits.upload_bytes)
    else:
        raise ApiError(400, "a video is named by stream:NAME, a data: URL, or an http(s) URL")
    if not clip:
        raise ApiError(400, "the clip is empty")
    return clip


class _Checked(urllib.request.HTTPRedirectHandler):
    """Redirects go only where a source may be."""

    def __init__(self, access: AccessRules):
        self._access = access

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise ApiError(422, "the clip's address leads away from http(s)")
        self._access.check_source(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_clip(url: str, access: AccessRules, most: int) -> bytes:
    """The bytes behind a URL; raises ``ApiError`` where it is closed, silent or too large."""
    access.check_source(url)
    try:
        opener = urllib.request.build_opener(_Checked(access))
        with opener.open(url, timeout=FETCH_SECONDS) as response:
            data: bytes = response.read(most + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ApiError(422, f"the clip could not be fetched ({str(reason)[:120]})") from None
    if len(data) > most:
        raise ApiError(413, f"the clip is longer than {most:,} bytes, the most that is taken")
    return data


def _extras(answer: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's shape has no place for: the stream time, evidence, what the question names, timings."""
    names = ("stream_time", "evidence", "mentions", "first_token_seconds", "tokens_per_second", "warm")
    return {name: answer[name] for name in names}


def _usage(answer: dict[str, Any]) -> dict[str, int]:
    prompt, made = answer["prompt_tokens"], answer["tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _completion(service: Service, answer: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer["text"], "refusal": None}
    return {
        "id": f"chatcmpl-{answer['id']}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.model_name,
        "choices": [{"index": 0, "message": message, "finish_reason": answer["finish_reason"], "logprobs": None}],
        "usage": _usage(answer),
        "flash_vstream": _extras(answer),
    }


def _chunks(service: Service, events: Iterator[Event], usage: bool) -> Iterator[ServerSentEvent]:
    """The answer as OpenAI's server-sent chunks; an error is one event that its clients raise."""
    created = int(time.time())

    def chunk(choices: list[dict[str, Any]], **more: Any) -> ServerSentEvent:
        told = {"id": f"chatcmpl-{created}", "object": "chat.completion.chunk", "created": created}
        return server_sent({**told, "model": service.model_name, "choices": choices, **more})

    def choice(delta: dict[str, Any], end: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": end}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    for event in events:
        if event.kind == "text":
            yield chunk(choice({"content": event.value}))
        elif event.kind == "error":
            yield server_sent({"error": {"message": event.value, "type": "server_error"}})
        else:
            yield chunk(choice({}, event.value["finish_reason"]), flash_vstream=_extras(event.value))
            if usage:
                yield chunk([], usage=_usage(event.value))
    yield server_sent(b"[DONE]")
