"""Clips and pictures sent with a question: watched only for that question, deleted once it is answered.

A clip is a stream with an unguessable name that callers cannot address, read from a file in a folder of this process.
"""

import contextlib
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import anyio
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.live.engine import Streams
from flash_vstream.serve.in_progress import InProgress
from flash_vstream.serve.security import ApiError
from flash_vstream.video.shared_memory import OwnedFolder
from flash_vstream.video.sources import Source

PREFIX = "~clip-"
"""Callers cannot give a stream a name with this prefix."""
AT_ONCE = 8
WATCH_SECONDS = 600.0
"""How long watching a clip may take."""
POLL_SECONDS = 0.02
PICTURE_FPS = 1.0
FOLDER = "flash-vstream-clips"
MAGIC = (
    (0, re.compile(rb"....(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL)),  # MP4, QuickTime
    (0, re.compile(rb"\x1aE\xdf\xa3")),  # Matroska, WebM
    (0, re.compile(rb"RIFF....AVI ", re.DOTALL)),
    (0, re.compile(rb"G.{187}G", re.DOTALL)),  # MPEG-TS
    (4, re.compile(rb"G.{191}G", re.DOTALL)),  # MPEG-TS of a Blu-ray or a camcorder
    (0, re.compile(rb"\x00\x00\x01[\xb3\xba]")),  # MPEG
    (0, re.compile(rb"FLV\x01|OggS|GIF8[79]a|\x30\x26\xb2\x75\x8e\x66\xcf\x11")),
)


def is_clip(name: str) -> bool:
    """Whether a stream name belongs to a clip."""
    return name.startswith(PREFIX)


def is_container(data: bytes) -> bool:
    """Whether ``data`` starts like a video container; playlists and lists of files do not."""
    return any(magic.match(data, at) for at, magic in MAGIC)


class Clips:
    """The clips of one server: ``add`` one, await ``watched``, ask about it, then ``remove`` it."""

    def __init__(self, live: Streams):
        self._live = live
        self._places = InProgress(AT_ONCE)
        self._owned = OwnedFolder(FOLDER)
        self._folder = Path(self._owned.path)

    @property
    def in_progress(self) -> int:
        """How many clips there are."""
        return self._places.count

    def add(self, media: bytes | Sequence[Image.Image], fps: float) -> str:
        """Start watching the bytes of a video file, or pictures at one per second; returns the stream's name.

        Raises ``ApiError`` if the bytes are not a video (422), ``AT_ONCE`` clips are already being watched (429), or
        the disk is full (409).
        """
        if isinstance(media, bytes) and not is_container(media):
            raise ApiError(422, "the clip cannot be watched: it is not an MP4, WebM, AVI, MPEG, FLV, Ogg or GIF file")
        if not self._places.begin():
            raise ApiError(429, f"{AT_ONCE} clips are being watched, the maximum; try again in a moment")
        name = PREFIX + secrets.token_hex(16)
        try:
            path = self._folder / name
            if isinstance(media, bytes):
                path.write_bytes(media)
            else:
                path.mkdir()
                for i, picture in enumerate(media):
                    picture.save(path / f"{i:05}.png", compress_level=1)
            fps = fps if isinstance(media, bytes) else PICTURE_FPS
            self._live.add(name, Source(str(path), fps, pace="fast"), carry=True)
        except BaseException as error:
            self._delete(name)
            self._places.end()
            if isinstance(error, OSError):
                raise ApiError(409, f"the clip cannot be kept on the server's disk ({error.strerror})") from None
            raise
        return name

    async def watched(self, name: str) -> None:
        """Wait until a clip has been watched to its end; raises ``ApiError`` if that fails."""
        try:
            with anyio.fail_after(WATCH_SECONDS):
                while (status := self._live.status(name)).state not in ("ended", "failed"):
                    await anyio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise ApiError(
                422, f"the clip took longer than {WATCH_SECONDS:.0f} s to watch; send a shorter one"
            ) from None
        if status.state == "failed" or status.time is None:
            reason = (status.error or "no frame of it could be decoded").replace(str(self._folder / name), "it")
            raise ApiError(422, f"the clip cannot be watched: {reason}")

    def remove(self, name: str) -> None:
        """Stop watching a clip and delete its files."""
        with contextlib.suppress(UserError):
            self._live.remove(name)
        self._delete(name)
        self._places.end()

    def _delete(self, name: str) -> None:
        path = self._folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete any clips that are left."""
        self._owned.cleanup()
