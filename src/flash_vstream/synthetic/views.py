"""Views of a still picture, as seen by a camera drifting across it.

A picture stands for a scene of a stream. Its views are cropped and encoded once, so that neither
training nor the stream builder runs the vision tower in its loop. View 0 is the whole picture and
view 1 its mirror image. The rest are windows along a straight path across the picture (mirrored for
about half of the pictures), in camera order.
"""

import hashlib
import random

from PIL import Image, ImageEnhance, ImageOps

VIEWS = 5
"""Views per picture: whole, mirrored, and three windows along a camera drift."""


def picture_views(picture: Image.Image, key: str, size: int = 256) -> list[Image.Image]:
    """The ``VIEWS`` views of ``picture``, each ``size`` by ``size`` RGB.

    ``key`` seeds the camera path, so a picture has the same views on every machine.
    """
    rng = _seeded(key)
    picture = picture.convert("RGB")
    mirror = ImageOps.mirror(picture)
    views = [picture, mirror]
    width, height = picture.size
    scale = rng.uniform(0.72, 0.92)
    start, end = [(rng.uniform(0, 1 - scale), rng.uniform(0, 1 - scale)) for _ in range(2)]
    canvas = mirror if rng.random() < 0.5 else picture
    for step in range(VIEWS - 2):
        along = step / (VIEWS - 3)
        left = (start[0] + (end[0] - start[0]) * along) * width
        top = (start[1] + (end[1] - start[1]) * along) * height
        views.append(canvas.crop((round(left), round(top), round(left + scale * width), round(top + scale * height))))
    return [view.resize((size, size), Image.Resampling.BICUBIC) for view in views]


def picture_crops(picture: Image.Image, key: str, count: int, size: int = 256) -> list[Image.Image]:
    """``count`` random parts of a picture, 35 to 80% of its area, half of them mirrored, in changed colors.

    They are for training a vision tower; ``key`` seeds them.
    """
    rng = _seeded(f"crops/{key}")
    width, height = picture.size
    crops = []
    for _ in range(count):
        area, shape = rng.uniform(0.35, 0.8), rng.uniform(0.8, 1.25)
        across, down = min(1.0, (area * shape) ** 0.5) * width, min(1.0, (area / shape) ** 0.5) * height
        left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
        crop = picture.convert("RGB").resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, left + across, top + down)
        )
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            crop = change(crop).enhance(rng.uniform(0.75, 1.25))
        crops.append(ImageOps.mirror(crop) if rng.random() < 0.5 else crop)
    return crops


def _seeded(key: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
