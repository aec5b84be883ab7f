"""Messages in OpenAI's shape to a question, the turns before it, and what it is about.

Everything that was sent is used, in its order, or refused by name.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.models.processing import check_text
from flash_vstream.serve.security import ApiError

MOST_PICTURES = 64
INSTRUCTIONS = ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image_url", "input_image")


class RequestError(ApiError):
    """A request that is refused in OpenAI's words: ``param`` names the field, ``code`` the reason."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(status, message)
        self.param, self.code = param, code


@dataclass
class Conversation:
    """A question with its earlier turns, about a ``video`` (a URL), about ``pictures`` (URLs), or about nothing."""

    question: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    video: str | None = None
    pictures: list[str] = field(default_factory=list)


def read_conversation(messages: Sequence[dict[str, Any]], instructions: str | None = None) -> Conversation:
    """What ``messages`` ask; raises ``RequestError`` for what cannot be used.

    Instructions (system and developer messages) stand before the question that they come before.
    """
    for i, message in enumerate(messages):
        _refuse_calls(message, f"messages[{i}]")
    if not messages or messages[-1].get("role") != "user":
        raise RequestError("the last message must be the user's", "messages")
    found = Conversation()
    asked = [instructions] if instructions else []
    answered: list[str] = []
    for i, message in enumerate(messages):
        role, where = message.get("role"), f"messages[{i}]"
        text = _text_of(message.get("content"), f"{where}.content", found, role == "user")
        if role == "assistant":
            answered.append(text)
        elif role in ("user", *INSTRUCTIONS):
            if answered:
                found.history.append(("\n".join(asked), "\n".join(answered)))
                asked, answered = [], []
            asked += [text] if text else []
        else:
            raise RequestError(
                f"a message's role is {str(role)[:40]!r}; send system, developer, user or assistant", where
            )
    found.question = "\n".join(asked)
    if not found.question.strip():
        raise RequestError("the question is empty; write what you want to know", "messages")
    return found


def _refuse_calls(message: dict[str, Any], where: str) -> None:
    if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise RequestError(
            "the model calls no tools, so there can be no message of role 'tool' and no tool_calls", where
        )


def _text_of(content: Any, where: str, found: Conversation, is_user: bool) -> str:
    """A message's text; its media are put into ``found``."""
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
                raise RequestError("videos and pictures are taken in the user's messages alone", at)
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
        raise RequestError(f"there are more than {MOST_PICTURES} pictures, the most that are taken", where)


def _checked(text: str, where: str) -> str:
    try:
        check_text(text)
    except UserError as error:
        raise RequestError(str(error), where) from None
    return text


def data_of(url: str) -> bytes | None:
    """What a ``data:`` URL holds; None for another URL. Raises ``RequestError`` for one that is not base64."""
    if url[:5].lower() != "data:":
        return None
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the data: URL is not base64 (data:video/mp4;base64,…)", "messages") from None
