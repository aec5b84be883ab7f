"""AM-RoPE: where the tokens of a Flash-VStream-Qwen memory stand in the language model's M-RoPE (arXiv 2506.23825).

A token's position has three coordinates: time, row and column. Details come first. Their time is the time of their
frame; the synopsis follows at an offset of as many positions as the details have tokens, on all three axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TRAINED_STEPS = 120
"""The most steps that a video had in training, whatever its length: 240 frames, two to a step."""


class VisualPositions(NamedTuple):
    """Positions ``[3, n]`` of the visual tokens, and the position of the text that follows."""

    positions: Tensor
    following: int


def block_positions(times: Tensor, rows: int, columns: int, start: int) -> Tensor:
    """Positions ``[3, n · rows · columns]`` of n frames at whole-number ``times [n]``, all offset by ``start``."""
    grids = torch.meshgrid(times.long(), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grids).reshape(3, -1) + start


def am_rope(
    details: Tensor, detail_grid: tuple[int, int], context: Tensor, context_grid: tuple[int, int], start: int
) -> VisualPositions:
    """Positions of a memory with details at times ``details [n]`` and a synopsis at times ``context [m]``, in steps.

    The text goes on after the largest position that any visual token has, so no token of the past stands beside or
    after the question.
    """
    offset = start + len(details) * detail_grid[0] * detail_grid[1]
    positions = torch.cat(
        [block_positions(details, *detail_grid, start), block_positions(context.round(), *context_grid, offset)], 1
    )
    return VisualPositions(positions, int(positions.max()) + 1 if positions.numel() else start)


def release_am_rope(
    details: Tensor, detail_grid: tuple[int, int], context: Tensor, context_grid: tuple[int, int], start: int
) -> VisualPositions:
    """The same as the release has it: the text goes on as if the steps were numbered without gaps.

    A video of more steps than the synopsis has slots therefore has visual tokens at and after the question's positions.
    """
    positions, _ = am_rope(details, detail_grid, context, context_grid, start)
    without_gaps = am_rope(
        torch.arange(len(details)), detail_grid, torch.arange(len(context)).double(), context_grid, start
    )
    return VisualPositions(positions, without_gaps.following)


def real_time_positions(
    details: int, detail_grid: tuple[int, int], context: int, context_grid: tuple[int, int], start: int
) -> VisualPositions:
    """The release's positions in real time: all axes have a token's column, and text follows as after plain tokens."""
    blocks = ((details, detail_grid), (context, context_grid))
    at, parts = start, []
    for count, (rows, columns) in blocks:
        parts.append(torch.arange(columns).repeat(count * rows) + at)
        at += count * rows * columns
    return VisualPositions(torch.cat(parts).expand(3, -1), at)


def steps_of(times: Tensor, first: float, last: float, frames: int) -> Tensor:
    """Times in seconds as steps: frames are numbered from 0, and a longer stream is shrunk to ``TRAINED_STEPS``."""
    span = last - first
    if span <= 0:
        return torch.zeros(len(times))
    return ((times - first) / span * min(frames - 1, TRAINED_STEPS - 1)).round()
