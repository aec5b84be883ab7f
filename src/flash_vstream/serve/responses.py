"""OpenAI's response object, and the events it is streamed as."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from flash_vstream.live.question_client import Event
from flash_vstream.serve.openai_shape import ResponseRequest, extras


def response_of(asked: ResponseRequest, answer: dict[str, Any]) -> dict[str, Any]:
    """A complete response."""
    return _Response(asked).ended(answer)


class _Response:
    """Builds one response object, from ``in_progress`` to its final status."""

    def __init__(self, asked: ResponseRequest):
        self.item = f"msg_{uuid.uuid4().hex}"
        self.fields: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": asked.model,
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.most_tokens,
            "metadata": (asked.model_extra or {}).get("metadata") or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
        }

    def message(self, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": parts}

    def ended(self, answer: dict[str, Any]) -> dict[str, Any]:
        cut = answer["finish_reason"] == "length"
        status = "incomplete" if cut else "completed"
        prompt, generated = answer["prompt_tokens"], answer["tokens"]
        return self.fields | {
            "status": status,
            "output": [self.message(status, [part(answer["text"])])],
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + generated,
            },
            "flash_vstream": extras(answer),
        }

    def failed(self, reason: str) -> dict[str, Any]:
        return self.fields | {"status": "failed", "error": {"code": "server_error", "message": reason}}


def part(text: str) -> dict[str, Any]:
    """A piece of output text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def response_events(asked: ResponseRequest, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, str]]:
    """The events that OpenAI's client reads; the last has the whole response, or the reason it failed."""
    response, number = _Response(asked), -1
    at = {"item_id": response.item, "output_index": 0, "content_index": 0}

    def sent(kind: str, **fields: Any) -> dict[str, str]:
        nonlocal number
        number += 1
        return {"event": kind, "data": json.dumps({"type": kind, "sequence_number": number, **fields})}

    yield sent("response.created", response=response.fields)
    yield sent("response.in_progress", response=response.fields)
    yield sent("response.output_item.added", output_index=0, item=response.message("in_progress", []))
    yield sent("response.content_part.added", **at, part=part(""))
    async for event in events:
        if event.kind == "text":
            yield sent("response.output_text.delta", **at, delta=event.value, logprobs=[])
        elif event.kind == "error":
            yield sent("response.failed", response=response.failed(event.value))
        else:
            text, whole = event.value["text"], response.ended(event.value)
            yield sent("response.output_text.done", **at, text=text, logprobs=[])
            yield sent("response.content_part.done", **at, part=part(text))
            yield sent("response.output_item.done", output_index=0, item=whole["output"][0])
            yield sent(f"response.{whole['status']}", response=whole)
