"""Media for ``bench chaos``: sound ones in several formats and odd sizes, and mutations of them."""

import io
import random
import struct
from base64 import b64encode
from pathlib import Path

import av
import numpy as np
from PIL import Image

FRAMES = 12
_FORMATS = (
    ("mp4", "mpeg4"),
    ("mkv", "mpeg4"),
    ("ts", "mpeg2video"),
    ("avi", "mjpeg"),
    ("webm", "libvpx"),
    ("gif", "gif"),
)
_SIZES = ((64, 48), (2, 2), (16, 720), (1280, 16), (50, 34))
_PICTURE_SIZES = ((64, 48), (1, 1), (1, 3000), (3000, 1), (640, 360), (333, 17))
_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def write_clip(path: Path, codec: str, size: tuple[int, int], frames: int = FRAMES, rate: int = 10) -> Path:
    """Write a clip in which a bright bar moves; the name's ending decides the format."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        for i in range(frames):
            image = np.full((size[1], size[0], 3), 40, np.uint8)
            image[:, (i * max(1, size[0] // frames)) % size[0] :][:, : max(1, size[0] // 8)] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


def picture(number: int, size: tuple[int, int] = (320, 180)) -> bytes:
    """A JPEG whose colour follows its number."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[:] = (number * 7 % 256, number * 13 % 256, 90)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


class MutatedMedia:
    """Clips and pictures, most of them damaged, odd in size or not what they claim to be; chosen by ``rng``."""

    def __init__(self, folder: Path, rng: random.Random):
        self.rng = rng
        self._clips: list[bytes] = []
        for i, (kind, codec) in enumerate(_FORMATS):
            for size in _SIZES[: 1 + i % len(_SIZES)]:
                try:
                    self._clips.append(write_clip(folder / f"seed.{kind}", codec, size).read_bytes())
                except (av.FFmpegError, ValueError):  # this FFmpeg has no such encoder, or not in that size
                    continue
        self._pictures = [_encoded(size, kind) for size in _PICTURE_SIZES for kind in _PICTURE_FORMATS]
        self._pictures += [_grey_16(), _png_that_claims(60_000, 60_000), _png_that_claims(0, 5)]

    def clip(self) -> bytes:
        """A clip, sound in one case of five."""
        return self._mutated(self.rng.choice(self._clips))

    def picture(self) -> bytes:
        """A picture, sound in one case of five."""
        return self._mutated(self.rng.choice(self._pictures))

    def either(self) -> bytes:
        """A clip or a picture."""
        return self.clip() if self.rng.random() < 0.5 else self.picture()

    def data_url(self, data: bytes) -> str:
        """The data as a data URL, now and then with a wrong type or broken base64."""
        kind = self.rng.choice(["video/mp4", "image/png", "image/jpeg", "text/plain", ""])
        text = b64encode(data).decode()
        return f"data:{kind};base64,{text[: self.rng.randrange(len(text) + 1)] if self.rng.random() < 0.1 else text}"

    def _mutated(self, whole: bytes) -> bytes:
        rng, data = self.rng, bytearray(whole)
        way = rng.choice(["sound", "flip", "flip", "cut", "both", "splice", "noise"])
        if way in ("flip", "both"):
            for _ in range(rng.randint(1, 40)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if way in ("cut", "both"):
            del data[rng.randrange(len(data)) :]
        if way == "splice":
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(64)] = rng.choice(self._pictures)[: rng.randrange(1, 512)]
        if way == "noise":
            data[rng.randrange(len(data)) :] = rng.randbytes(rng.randrange(2048))
        return bytes(data)


def _encoded(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, kind)
    return file.getvalue()


def _grey_16() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


def _png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""
    data = bytearray(_encoded((8, 8), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)
