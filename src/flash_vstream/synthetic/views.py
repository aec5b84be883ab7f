"""Views of a still picture, as seen by a camera drifting across it.

A picture stands for a scene of a stream. Its views are cropped and encoded once, so that neither
training nor the stream builder runs the vision tower in its loop. View 0 is the whole picture and
view 1 its mirror image. The rest are windows along a straight path across the picture (mirrored for
about half of the pictures), in camera order.
"""

import hashlib
import random

from PIL import Image, ImageOps

VIEWS = 5
"""Views per picture: whole, mirrored, and three windows along a camera drift."""


def picture_views(picture: Image.Image, key: str, size: int = 256) -> list[Image.Image]:
    """The ``VIEWS`` views of ``picture``, each ``size`` by ``size`` RGB.

    ``key`` seeds the camera path, so a picture has the same views on every machine.
    """
    rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
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
