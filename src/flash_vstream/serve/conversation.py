"""Reads messages in OpenAI's format into a question, the turns before it, and the media it is about.

Every part of a message is used in order, or refused with an error that names it.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.models.prompt_text import check_text
from flash_vstream.serve.security import ApiError

MOST_PICTURES = 64
INSTRUCTIONS = ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image_url", "input_image")


class RequestError(ApiError):
    """A refused request, in OpenAI's terms: ``param`` names the field, ``code`` the reason."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(status, message)
        self.param, self.code = param, code


@dataclass
class Conversation:
    """A question with its earlier turns, about a ``video`` (a URL), ``pictures`` (URLs), or neither."""

    question: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    video: str | None = None
    pictures: list[str] = field(default_factory=list)


def read_conversation(messages: Sequence[dict[str, Any]], instructions: str | None = None) -> Conversation:
    """Read ``messages``; raises ``RequestError`` for anything that cannot be used.

    Instructions (system and developer messages) become part of the question that follows them.
    """
    for i, message in enumerate(messages):
        _refuse_calls(message, f"messages[{i}]")
    if not messages or messages[-1].get("role") != "user":
        raise RequestError("the last message must be the user's", "messages")
    conversation = Conversation()
    questions = [instructions] if instructions else []
    answers: list[str] = []
    for i, message in enumerate(messages):
        role, where = message.get("role"), f"messages[{i}]"
        text = _text_of(message.get("content"), f"{where}.content", conversation, role == "user")
        if role == "assistant":
            answers.append(text)
        elif role in ("user", *INSTRUCTIONS):
            if answers:
                conversation.history.append(("\n".join(questions), "\n".join(answers)))
                questions, answers = [], []
            questions += [text] if text else []
        else:
            raise RequestError(
                f"a message's role is {str(role)[:40]!r}; send system, developer, user or assistant", where
            )
    conversation.question = "\n".join(questions)
    if not conversation.question.strip():
        raise RequestError("the question is empty; write what you want to know", "messages")
    return conversation


def _refuse_calls(message: dict[str, Any], where: str) -> None:
    if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise RequestError(
            "the model calls no tools, so there can be no message of role 'tool' and no tool_calls", where
        )


def _text_of(content: Any, where: str, found: Conversation, is_user: bool) -> str:
    """A message's text; its media are added to ``found``."""
    if content is None or isinstance(content, str):
        return _checked(content or "", where)
    if not isinstance(content, list):
        raise RequestError("a message's content is text or a list of parts", where)
    texts = []
    for j, part in enumerate(content):
        at = f"{where}[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(_checked(part["text"], at))
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(_checked(part["refusal"], at))
        elif kind in (*PICTURE_PARTS, "video_url"):
            if not is_user:
                raise RequestError("videos and pictures are accepted only in the user's messages", at)
            _add_media(part, kind, at, found)
        else:
            raise RequestError(
                f"a part of type {str(kind)[:40]!r} is not understood; send text, video_url or image_url", at
            )
    return "\n".join(texts)


def _add_media(part: dict[str, Any], kind: str, where: str, found: Conversation) -> None:
    named = part.get("image_url" if kind in PICTURE_PARTS else kind)
    url = named.get("url") if isinstance(named, dict) else named
    if not isinstance(url, str):
        raise RequestError(f'a part of type {kind} needs {{"{kind}": {{"url": "…"}}}}', where)
    _checked(url, where)
    if kind == "video_url":
        if found.pictures:
            raise RequestError("a question is about one video or about pictures, not both; send one of them", where)
        if found.video not in (None, url):
            raise RequestError("this is a second video; a conversation is about one", where)
        found.video = url
        return
    if found.video is not None:
        raise RequestError("a question is about one video or about pictures, not both; send one of them", where)
    found.pictures.append(url)
    if len(found.pictures) > MOST_PICTURES:
        raise RequestError(f"there are more than {MOST_PICTURES} pictures, the limit here", where)


def _checked(text: str, where: str) -> str:
    try:
        check_text(text)
    except UserError as error:
        raise RequestError(str(error), where) from None
    return text


def data_of(url: str) -> bytes | None:
    """The bytes in a ``data:`` URL; None for any other URL. Raises ``RequestError`` if it is not base64."""
    if url[:5].lower() != "data:":
        return None
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the data: URL is not base64 (data:video/mp4;base64,…)", "messages") from None
