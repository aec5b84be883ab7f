"""What a stream has come to, in shared memory: how workers see it, and how it outlives them.

A memory is constant, so its whole state has a place of fixed size. The frame worker publishes it
after every write; a question worker reads it whenever it likes; a frame worker that was restarted
goes on from it. Neither side waits for the other: there are two places, and a reader that meets one
being rewritten reads again.
"""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_vstream.files import atomic_write

_NOTES_BYTES = 4096
_LAYOUT_BYTES = 16384
_HEADER = np.dtype([("latest", "<i8"), ("sequence", "<i8", (2,))])
_LAYOUT_AT = 64


class SharedTensors:
    """Two places for named tensors of fixed shapes and a few notes (JSON), in a file that is mapped.

    The file begins with its own layout, so whoever opens it needs to know nothing else.
    """

    def __init__(self, path: str):
        """Open the tensors at ``path``; raises ``FileNotFoundError`` when there is none."""
        self.path = path
        self._map = np.memmap(path, np.uint8, "r+")
        self._header = self._map[: _HEADER.itemsize].view(_HEADER)
        layout = bytes(self._map[_LAYOUT_AT:_LAYOUT_BYTES]).partition(b"\0")[0]
        self._fields: dict[str, tuple[int, list[int], torch.dtype]] = {}
        at = 0
        for name, shape, kind in json.loads(layout):
            dtype = getattr(torch, kind)
            self._fields[name] = (at, shape, dtype)
            at += -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64
        self._place = at + _NOTES_BYTES

    @classmethod
    def create(cls, path: str, template: Mapping[str, Tensor]) -> "SharedTensors":
        """The file at ``path`` for tensors like those of ``template``, with what it holds.

        A file that is there with another layout is replaced by an empty one. It appears whole.
        """
        layout = json.dumps(
            [[name, list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in template.items()]
        ).encode()
        if len(layout) >= _LAYOUT_BYTES - _LAYOUT_AT:
            raise ValueError(f"the layout takes {len(layout)} bytes; {_LAYOUT_BYTES - _LAYOUT_AT - 1} at most fit")
        if os.path.exists(path):
            shared = cls(path)
            if bytes(shared._map[_LAYOUT_AT : _LAYOUT_AT + len(layout) + 1]) == layout + b"\0":
                return shared
        sizes = [-(-value.numel() * value.element_size() // 64) * 64 for value in template.values()]
        with atomic_write(path) as scratch, open(scratch, "wb") as file:
            file.truncate(_LAYOUT_BYTES + 2 * (sum(sizes) + _NOTES_BYTES))
            file.seek(_LAYOUT_AT)
            file.write(layout)
        return cls(path)

    @property
    def nbytes(self) -> int:
        """The file's size; it never grows."""
        return self._map.size

    @property
    def version(self) -> int:
        """How often something was published; 0 before the first."""
        return int(self._header["latest"][0])

    def publish(self, state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Make ``state`` the newest; only one process may publish. ``notes`` must fit 4 kB of JSON."""
        version = self.version + 1
        place = self._at(version)
        text = json.dumps(notes).encode()
        if len(text) >= _NOTES_BYTES:
            raise ValueError(f"the notes are {len(text)} bytes; {_NOTES_BYTES - 1} at most fit")
        self._header["sequence"][0, version % 2] = -version  # being written
        for name, (at, _, _) in self._fields.items():
            raw = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            place[at : at + raw.size] = raw
        place[-_NOTES_BYTES:][: len(text) + 1] = np.frombuffer(text + b"\0", np.uint8)
        self._header["sequence"][0, version % 2] = version
        self._header["latest"][0] = version

    def read(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest tensors (all, or those of ``names``) and notes, copied; None before the first."""
        while version := self.version:
            place = self._at(version)
            wanted = self._fields if names is None else [name for name in self._fields if name in names]
            state = {name: self._copied(place, name) for name in wanted}
            notes = bytes(place[-_NOTES_BYTES:])
            if int(self._header["sequence"][0, version % 2]) == version:
                return state, json.loads(notes.partition(b"\0")[0])
        return None

    def _at(self, version: int) -> np.ndarray:
        begin = _LAYOUT_BYTES + (version % 2) * self._place
        return self._map[begin : begin + self._place]

    def _copied(self, place: np.ndarray, name: str) -> Tensor:
        at, shape, dtype = self._fields[name]
        raw = np.array(place[at : at + int(np.prod(shape)) * dtype.itemsize])
        return torch.from_numpy(raw).view(dtype).reshape(shape)
