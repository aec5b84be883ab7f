"""OpenAI's request and error formats: which settings are honoured, clamped, or refused by name."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from flash_vstream.errors import UserError
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS, PromptTooLongError
from flash_vstream.models.prompt_text import check_text
from flash_vstream.serve.conversation import RequestError
from flash_vstream.serve.security import ApiError

MOST_TOKENS = 512
MOST_STOPS = 4

HONOURED: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}}, {}),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "reasoning": ({},),
    "store": (False,),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "include": ([],),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "prompt": (),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}
"""The values of OpenAI's settings that are accepted: greedy decoding, one answer, text only, nothing stored."""
IGNORED = frozenset(
    ("user", "metadata", "seed", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)
"""Settings that are ignored since they do not affect the answer: labels, and the seed (decoding is greedy)."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    stream: bool | None = False
    fps: float = Field(1.0, gt=0, le=30, description="Frames watched per second of a clip.")

    def refuse_others(self) -> None:
        """Raise ``RequestError`` for a setting that cannot be honoured."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED:
                continue
            if name not in HONOURED:
                raise RequestError(f"the setting {name[:40]!r} is not known here", name[:40], "unknown_parameter")
            if not any(value == honoured for honoured in HONOURED[name]):
                takes = " or ".join(json.dumps(honoured) for honoured in HONOURED[name])
                raise RequestError(
                    f"{name} can only be {takes} here; answers are greedy"
                    if takes
                    else f"{name} is not supported here",
                    name,
                    "unsupported_value",
                )


class ChatRequest(_Settings):
    """``POST /v1/chat/completions``; a video is a part of type ``video_url`` in a user message."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1, description=f"At most {MOST_TOKENS}; larger values are clamped.")
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None

    @property
    def most_tokens(self) -> int:
        """The most tokens the answer may have."""
        return min(self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS, MOST_TOKENS)

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer; raises ``RequestError`` for invalid ones."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stops) > MOST_STOPS or not all(0 < len(stop) <= 100 for stop in stops):
            raise RequestError(f"stop is a text of 1 to 100 characters, or up to {MOST_STOPS} of them", "stop")
        for stop in stops:
            check_text(stop)
        return stops


class ResponseRequest(_Settings):
    """``POST /v1/responses``: text in, text out; nothing is stored."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream_options: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int:
        """The most tokens the answer may have."""
        return min(self.max_output_tokens or MAX_NEW_TOKENS, MOST_TOKENS)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The input as messages; raises ``RequestError`` for any other kind of item."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            if item.get("type", "message") != "message":
                raise RequestError(f"an item of type {str(item['type'])[:40]!r} is not understood", f"input[{i}]")
        return self.input


class OpenAIRoute(APIRoute):
    """A route with errors in OpenAI's format: 400 for invalid requests, with type, param and code."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, with its errors turned into OpenAI's."""
        handle = super().get_route_handler()

        async def caught(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                where = [str(part) for part in first["loc"] if part != "body"]
                if first["type"] == "json_invalid":
                    return error_response(400, "the body is not JSON")
                return error_response(400, f"{'.'.join(where) or 'the body'}: {first['msg']}", ".".join(where) or None)
            except PromptTooLongError as error:
                return error_response(400, str(error), "messages", "context_length_exceeded")
            except RequestError as error:
                return error_response(error.status, str(error), error.param, error.code)
            except (ApiError, UserError) as error:
                status = getattr(error, "status", 400)
                return error_response(400 if status == 422 else status, str(error))

        return caught


def extras(answer: dict[str, Any]) -> dict[str, Any]:
    """The fields OpenAI's format has no place for: stream time, evidence, mentions, timings."""
    names = ("stream_time", "evidence", "mentions", "first_token_seconds", "tokens_per_second", "warm")
    return {name: answer[name] for name in names}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's format."""
    kind = KINDS.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
