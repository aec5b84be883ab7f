"""Pictures in prompts, as Transformers' own pipelines and chat templates give them.

The pictures of a prompt are a stream of one picture a second, remembered as any stream is. What stands in the prompt
is known without looking at them as long as the memory merges none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import load_image

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, Slots, StarConfig, StarMemory

Turns = list[tuple[str, str]]


def pictures_snapshot(star: StarConfig, count: int) -> MemorySnapshot:
    """The shape of a memory of ``count`` pictures: its slots and their times, with features of one channel.

    Raises ``UserError`` for more pictures than the temporal memory keeps apart.
    """
    if star.compat != "none" or not star.temporal_length:
        raise UserError("pictures in a prompt need a memory with temporal slots; watch them as a stream instead")
    if count > star.temporal_length:
        raise UserError(
            f"{count} pictures are more than the {star.temporal_length} that a prompt takes; watch them as a stream"
        )
    memory = StarMemory(replace(star, abstract_length=0, longterm_length=0), 1)
    times = [float(second) for second in range(count)]
    memory.write(torch.zeros(count, star.spatial_size**2, 1), times)
    filled = min(count, star.abstract_length)
    times_of = torch.arange(filled, dtype=torch.float64)
    return replace(memory.read(), abstract=Slots.of_frames(torch.zeros(filled, star.abstract_size**2, 1), times_of))


def per_prompt(images: Any, prompts: int) -> list[list[Image.Image]]:
    """The pictures of each prompt: one picture or list for one prompt, one of either for each of several."""
    if images is None:
        return [[] for _ in range(prompts)]
    if isinstance(images, Image.Image) or not isinstance(images, Sequence):
        images = [images]
    if any(isinstance(item, list | tuple) for item in images):
        groups = [list(item) if isinstance(item, list | tuple) else [item] for item in images]
    elif prompts == 1:
        groups = [list(images)]
    else:
        groups = [[item] for item in images]
    if len(groups) != prompts:
        raise UserError(f"there are pictures for {len(groups)} prompts, and {prompts} prompts")
    return groups


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Turns, list[Image.Image]]:
    """A chat's open question, its earlier turns, and its pictures, which must come before the first answer.

    Raises ``UserError`` for what a model of this kind cannot take, by name.
    """
    texts: list[str] = []
    pictures: list[Image.Image] = []
    for at, message in enumerate(messages):
        role = ("user", "assistant")[at % 2]
        if message.get("role") != role:
            raise UserError(
                f"message {at + 1} is from {message.get('role')!r}, where {role!r} is expected; questions and answers"
                " take turns, and the prompt's system message is fixed"
            )
        text, shown = _read_content(message.get("content"))
        if shown and at:
            raise UserError(f"message {at + 1} has a picture; pictures belong to the first message")
        texts.append(text)
        pictures += shown
    if len(texts) % 2 == 0:
        raise UserError("the last message must be a question; continuing an answer is not supported")
    turns = [(texts[i], texts[i + 1]) for i in range(0, len(texts) - 1, 2)]
    return texts[-1], turns, pictures


def _read_content(content: Any) -> tuple[str, list[Image.Image]]:
    if isinstance(content, str):
        return content, []
    texts, pictures = [], []
    for part in content or ():
        kind = part.get("type")
        if kind == "text":
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            source = next((part[key] for key in ("image", "url", "path", "image_url") if part.get(key)), None)
            source = source.get("url") if isinstance(source, Mapping) else source
            if source is None:
                raise UserError("a picture in a message has no image, url or path")
            pictures.append(load_image(source))
        else:
            raise UserError(f"a message holds {kind!r}; text and pictures can be read, a video is watched instead")
    return "".join(texts), pictures
