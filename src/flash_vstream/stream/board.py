"""The state of one stream's memory in shared memory: how handlers see it, and how it outlives them.

A memory is constant, so its whole state has a place of fixed size. The frame handler publishes it
after every write; a question handler reads it whenever it likes; a frame handler that was restarted
goes on from it. Neither side waits for the other: there are two places, and a reader that meets one
being rewritten reads again.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NOTES_BYTES = 4096
_HEADER = np.dtype([("latest", "<i8"), ("sequence", "<i8", (2,))])


class StateBoard:
    """Two places for a state of the given shapes and a few notes (JSON), in a file that is mapped.

    ``template`` is a ``state_dict`` of the memory; every process that maps the file must give one
    of the same names, shapes and dtypes.
    """

    def __init__(self, path: str, template: Mapping[str, Tensor]):
        self._fields: dict[str, tuple[int, Tensor]] = {}
        at = 0
        for name, value in sorted(template.items()):
            self._fields[name] = (at, torch.empty_like(value, device="cpu"))
            at += -(-value.numel() * value.element_size() // 64) * 64
        self._place = at + _NOTES_BYTES
        size = 64 + 2 * self._place
        if not os.path.exists(path) or os.path.getsize(path) != size:
            with open(path, "wb") as file:
                file.truncate(size)
        self._map = np.memmap(path, np.uint8, "r+", shape=(size,))
        self._header = self._map[: _HEADER.itemsize].view(_HEADER)
        self.path = path

    @property
    def nbytes(self) -> int:
        """The file's size; it never grows."""
        return self._map.size

    @property
    def version(self) -> int:
        """How often a state was published; 0 before the first."""
        return int(self._header["latest"][0])

    def publish(self, state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Make ``state`` the newest; only one process may publish. ``notes`` must fit 4 kB of JSON."""
        version = self.version + 1
        place = self._at(version)
        text = json.dumps(notes).encode()
        if len(text) >= _NOTES_BYTES:
            raise ValueError(f"the notes are {len(text)} bytes; {_NOTES_BYTES - 1} at most fit")
        self._header["sequence"][0, version % 2] = -version  # being written
        for name, (at, _) in self._fields.items():
            raw = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            place[at : at + raw.size] = raw
        place[-_NOTES_BYTES:][: len(text) + 1] = np.frombuffer(text + b"\0", np.uint8)
        self._header["sequence"][0, version % 2] = version
        self._header["latest"][0] = version

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state and notes, copied whole; None before the first."""
        while version := self.version:
            copy = self._at(version).copy()
            if int(self._header["sequence"][0, version % 2]) == version:
                return self._unpacked(copy)
        return None

    def _at(self, version: int) -> np.ndarray:
        begin = 64 + (version % 2) * self._place
        return self._map[begin : begin + self._place]

    def _unpacked(self, place: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = {}
        for name, (at, like) in self._fields.items():
            raw = torch.from_numpy(place[at : at + like.numel() * like.element_size()])
            state[name] = raw.clone().view(like.dtype).reshape(like.shape)
        notes = json.loads(bytes(place[-_NOTES_BYTES:]).partition(b"\0")[0])
        return state, notes
