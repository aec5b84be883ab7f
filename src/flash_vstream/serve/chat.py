"""``/v1/models``, ``/v1/chat/completions`` and ``/v1/responses`` in OpenAI's format, so its clients work unchanged.

A video is a content part of type ``video_url``: ``stream:NAME`` for the current state of a live stream, a ``data:``
URL with a clip, or an http(s) URL of one. Parts of type ``image_url`` are pictures, one per second.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request

from flash_vstream.live.question_client import Event
from flash_vstream.serve.answers import Answers, AnswerStream, while_connected
from flash_vstream.serve.conversation import RequestError, read_conversation
from flash_vstream.serve.openai_shape import ChatRequest, OpenAIRoute, ResponseRequest, extras
from flash_vstream.serve.responses import response_events, response_of
from flash_vstream.serve.service import Service


def add_chat(app: FastAPI, service: Service, answers: Answers) -> None:
    """The endpoints that OpenAI's clients call."""
    router = APIRouter(route_class=OpenAIRoute, tags=["chat"])
    model = {"id": service.model_name, "object": "model", "created": int(service.started), "owned_by": "flash-vstream"}

    def check_model(name: str) -> None:
        if name != service.model_name:
            message = f"the model here is {service.model_name!r}, not {name[:80]!r}"
            raise RequestError(message, "model", "model_not_found", 404)

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        """The one model this server runs."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        """The model, if it is the one this server runs."""
        check_model(name)
        return model

    @router.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Any:
        """Chat about a stream, a clip, pictures, or nothing. Unsupported settings are refused."""
        check_model(asked.model)
        asked.refuse_others()
        begin = answers.begin(read_conversation(asked.messages), asked.fps, asked.most_tokens, asked.stops)
        if asked.stream:
            usage = bool((asked.stream_options or {}).get("include_usage"))
            answer = await while_connected(request, begin)
            return AnswerStream(answer, lambda events: _chunks(service.model_name, events, usage))

        async def whole() -> dict[str, Any]:
            return await (await begin).finished()

        return _completion(service.model_name, await while_connected(request, whole()))

    @router.post("/v1/responses")
    async def respond(request: Request, asked: ResponseRequest) -> Any:
        """Answer in the format of OpenAI's Responses API; nothing is stored."""
        check_model(asked.model)
        asked.refuse_others()
        begin = answers.begin(read_conversation(asked.messages, asked.instructions), asked.fps, asked.most_tokens)
        if asked.stream:
            answer = await while_connected(request, begin)
            return AnswerStream(answer, lambda events: response_events(asked, events))

        async def whole() -> dict[str, Any]:
            return await (await begin).finished()

        return response_of(asked, await while_connected(request, whole()))

    app.include_router(router)


def _usage(answer: dict[str, Any]) -> dict[str, int]:
    prompt, generated = answer["prompt_tokens"], answer["tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _completion(model: str, answer: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer["text"], "refusal": None}
    return {
        "id": f"chatcmpl-{answer['id']}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": answer["finish_reason"], "logprobs": None}],
        "usage": _usage(answer),
        "flash_vstream": extras(answer),
    }


async def _chunks(model: str, events: AsyncIterator[Event], usage: bool) -> AsyncIterator[dict[str, str]]:
    """The answer as OpenAI's chunks; an error is a single event, which its clients raise."""
    created = int(time.time())
    head = {"id": f"chatcmpl-{time.time_ns():x}", "object": "chat.completion.chunk", "created": created, "model": model}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> dict[str, str]:
        return {"data": json.dumps({**head, "choices": choices, **more})}

    def choice(delta: dict[str, Any], end: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    async for event in events:
        if event.kind == "text":
            yield chunk(choice({"content": event.value}))
        elif event.kind == "error":
            error = {"message": event.value, "type": "server_error", "param": None, "code": None}
            yield {"data": json.dumps({"error": error})}
        else:
            yield chunk(choice({}, event.value["finish_reason"]), flash_vstream=extras(event.value))
            if usage:
                yield chunk([], usage=_usage(event.value))
    yield {"data": "[DONE]"}
