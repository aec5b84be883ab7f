"""The project's only decoder for encoded pictures: RGB output, limited in pixels and formats.

A model sees the centre square of a frame. People see all of it: a small JPEG that is made where the frame is decoded.
"""

import io
from base64 import b64encode
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flash_vstream.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
"""The formats that callers may send."""
LOCAL_FORMATS = (*FORMATS, "BMP", "GIF")
"""The formats allowed for local files."""
MOST_PIXELS = 16_000_000
"""About a phone's picture; 48 MB decoded."""
WHOLE_SIDE = 640
"""The longer side of the picture of a whole frame, in pixels, at most."""
WHOLE_BYTES = 65536
"""The most bytes that the picture of a whole frame takes."""
_QUALITIES = (80, 60, 40, 20, 5)
HIGH_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_picture(
    data: bytes | Path,
    side: int | None = None,
    most_pixels: int = MOST_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    draft: int | None = None,
) -> Image.Image:
    """The RGB picture in ``data`` (or in the file at that path), upright.

    With ``side``, its centre is scaled to ``side`` by ``side`` pixels. With ``side`` or ``draft``, a large JPEG is
    decoded at a fraction of its size, with at least so many pixels on each side. Raises ``UserError`` for a damaged
    picture, one not in ``formats``, or one of more than ``most_pixels``, which is read from its header before any pixel
    is decoded.
    """
    try:
        picture: Image.Image = Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=formats)
    except Exception:  # Pillow raises many kinds of error for damaged files, here and below
        raise UserError(f"this is not a {', '.join(formats[:-1])} or {formats[-1]} picture") from None
    with picture:
        width, height = picture.size
        if width * height > most_pixels:
            raise UserError(f"the picture has {width}x{height} pixels; the limit is {most_pixels:,}")
        try:
            if (least := draft or side) is not None:
                picture.draft("RGB", (least, least))
            picture = _upright(_rgb(picture))
        except Exception:
            raise UserError(f"the {picture.format or 'picture'} file is damaged; it cannot be decoded") from None
        return picture if side is None else ImageOps.fit(picture, (side, side))


def centre_and_whole(
    data: bytes | Path, side: int, most_pixels: int = MOST_PIXELS, formats: tuple[str, ...] = FORMATS
) -> tuple[np.ndarray, bytes]:
    """An encoded picture's centre ``[side, side, 3]`` uint8, and the whole of it as a small JPEG.

    Raises ``UserError`` as ``decode_picture`` does.
    """
    picture = decode_picture(data, None, most_pixels, formats, draft=max(side, WHOLE_SIDE * 9 // 16))
    return np.asarray(ImageOps.fit(picture, (side, side))), encode_whole(picture)


def encode_whole(picture: Image.Image) -> bytes:
    """A frame's picture for people: a JPEG of at most ``WHOLE_SIDE`` pixels a side and ``WHOLE_BYTES`` bytes."""
    if max(picture.size) > WHOLE_SIDE:
        picture = picture.copy()
        picture.thumbnail((WHOLE_SIDE, WHOLE_SIDE), Image.Resampling.BILINEAR)
    return encode_jpeg(picture, WHOLE_BYTES)


def encode_jpeg(picture: Image.Image, most_bytes: int) -> bytes:
    """The picture as a JPEG of at most ``most_bytes``, at the best quality that fits; empty if none does."""
    for quality in _QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= most_bytes:
            return file.getvalue()
    return b""


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; as it is if that is damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB; ``Image.convert`` alone would clip 16-bit grey to white."""
    if picture.mode not in HIGH_GREY:
        return picture.convert("RGB")
    exif = picture.info.get("exif")
    grey = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
    converted = Image.fromarray(grey).convert("RGB")
    if exif:
        converted.info["exif"] = exif
    return converted


def data_url(jpeg: bytes) -> str:
    """A JPEG as a data URL."""
    return f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"
