"""The project's only decoder for encoded pictures: RGB output, limited in pixels and formats."""

import io
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
HIGH_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_picture(
    data: bytes | Path,
    side: int | None = None,
    most_pixels: int = MOST_PIXELS,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """The RGB picture in ``data`` (or in the file at that path), upright.

    With ``side``, its centre is scaled to ``side`` by ``side`` pixels, and a large JPEG is decoded at a fraction of its
    size. Raises ``UserError`` for a damaged picture, one not in ``formats``, or one of more than ``most_pixels``, which
    is read from its header before any pixel is decoded.
    """
    try:
        picture: Image.Image = Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=formats)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"this is not a {', '.join(formats[:-1])} or {formats[-1]} picture") from None
    with picture:
        width, height = picture.size
        if width * height > most_pixels:
            raise UserError(f"the picture has {width}x{height} pixels; the limit is {most_pixels:,}")
        try:
            if side is not None:
                picture.draft("RGB", (side, side))
            picture = ImageOps.exif_transpose(_rgb(picture))
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError):
            raise UserError(f"the {picture.format or 'picture'} file is damaged; it cannot be decoded") from None
        return picture if side is None else ImageOps.fit(picture, (side, side))


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
