"""What a model is given of a stream: its memory, parts of it, a few frames, or nothing.

The readers beside ``star`` are the baselines that say whether the memory is worth anything.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.memory import PARTS, MemoryView
from flash_vstream.models import FlashVStreamForConditionalGeneration

Reader = Callable[[Tensor, Tensor], MemoryView | None]
"""From features ``[T, P², D]`` and times ``[T]`` to what is asked; None is no video at all."""

READERS = "star, star-PART (without a part: abstract, temporal, retrieved, spatial), recent:N, uniform:N, blind"


def make_reader(name: str, network: FlashVStreamForConditionalGeneration) -> Reader:
    """The reader called ``name``; raises ``UserError`` for one that does not exist.

    ``star`` writes every frame to the memory. ``recent:N`` and ``uniform:N`` write the newest N
    frames, or N spread evenly over the stream with its last, to a fresh memory of the same sizes.
    """
    kind, _, argument = name.partition(":")
    if name == "blind":
        return lambda features, times: None
    if name == "star":
        return lambda features, times: _written(network, features, times)
    if kind in ("recent", "uniform") and argument.isdigit() and int(argument) > 0:
        count = int(argument)
        choose = _newest if kind == "recent" else _spread
        return lambda features, times: _written(
            network, *(rows[choose(len(times), count)] for rows in (features, times))
        )
    part = name.removeprefix("star-")
    if part in PARTS and part != name:
        return lambda features, times: without(_written(network, features, times), part)
    raise UserError(f"no reader is called {name!r}; choose from {READERS}")


def without(view: MemoryView, part: str) -> MemoryView:
    """The view with one part empty."""
    return replace(view, **{part: getattr(view, part)[torch.arange(0)]})


def _written(network: FlashVStreamForConditionalGeneration, features: Tensor, times: Tensor) -> MemoryView:
    memory = network.new_memory(torch.float32)
    memory.write(features, times)
    return memory.read()


def _newest(frames: int, count: int) -> Tensor:
    return torch.arange(max(0, frames - count), frames)


def _spread(frames: int, count: int) -> Tensor:
    return torch.linspace(0, frames - 1, min(count, frames)).round().long()
