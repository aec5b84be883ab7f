"""The shared picture decoder: pictures as they are meant to look, and nothing too large decoded."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.video.pictures import MOST_PIXELS, decode_picture


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a large size but has only one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(width * 3 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(kind):
    picture = decode_picture(encoded(Image.new("RGB", (60, 40), (200, 100, 50)), kind))
    assert (picture.mode, picture.size) == ("RGB", (60, 40))
    assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() < 12
    assert decode_picture(encoded(picture, kind), side=16).size == (16, 16)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_modes(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_picture(encoded(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), kind)).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_brightness():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    picture = np.asarray(decode_picture(encoded(Image.fromarray(ramp), "PNG")))
    assert np.abs(picture[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(encoded(Image.new("RGB", (60, 40)), "JPEG", exif=exif)).size == (40, 60)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a JPEG"),
        (b"text", "not a JPEG"),
        (encoded(Image.new("RGB", (8, 8)), "BMP"), "not a JPEG"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "not a JPEG"),
        (encoded(Image.new("RGB", (200, 200), (9, 99, 9)), "PNG")[:80], "damaged|not a JPEG"),
        (encoded(Image.effect_noise((200, 200), 60), "JPEG")[:900], "damaged"),
        (png_header(6300, 6300), "6300x6300 pixels"),
        (png_header(13300, 13300), "13300x13300 pixels|not a JPEG"),
        (png_header(2**31 - 1, 2**31 - 1), "pixels|not a JPEG"),
    ],
)
def test_what_is_no_picture_or_too_large_is_told(data, message):
    with pytest.raises(UserError, match=message):
        decode_picture(data)


def test_a_large_picture_costs_nothing_before_it_is_refused():
    data = png_header(6300, 6300)
    tracemalloc.start()
    with pytest.raises(UserError):
        decode_picture(data, side=224)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_large_jpeg_is_decoded_small(monkeypatch):
    data = encoded(Image.new("RGB", (4000, 3000), (50, 60, 70)), "JPEG")
    assert MOST_PIXELS >= 4000 * 3000
    sizes = []
    fit = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: sizes.append(self.size) or fit(self, mode))
    assert decode_picture(data, side=224).size == (224, 224)
    assert max(sizes[0]) <= 1000


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_costs_no_picture():
    """Regression: Pillow raises struct.error, TypeError and others for it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0131], exif[0x011A] = 6, "a camera", 72.0
    data = encoded(Image.new("RGB", (60, 40), (9, 99, 9)), "JPEG", exif=exif)
    begin = data.index(b"Exif")
    sizes = set()
    for at in range(begin, begin + len(exif.tobytes())):
        for value in (0, 1, 128, 255):
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            sizes.add(decode_picture(damaged).size)
    assert sizes == {(60, 40), (40, 60)}


def test_whatever_pillow_raises_is_a_damaged_picture(monkeypatch):
    def fail(*_):
        raise AttributeError("of a codec")

    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match="damaged"):
        decode_picture(data)
