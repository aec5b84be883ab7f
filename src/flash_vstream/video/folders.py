"""A folder of pictures as a stream."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.video.pictures import LOCAL_FORMATS, centre_and_whole
from flash_vstream.video.reader import MAX_PIXELS, Frame, MissingSourceError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def read_folder(
    folder: str,
    fps: float,
    size: int,
    begin: float = 0.0,
    note: Callable[[str], None] = lambda _: None,
    beat: Callable[[], None] = lambda: None,
    check_path: Callable[[str], None] = lambda _: None,
) -> Iterator[Frame]:
    """Yield a folder's pictures in natural order of their names, one per tick of the frame rate, from ``begin`` on.

    Skips hidden files and files that are not pictures; ``note`` is called once at the end with a message that names
    the latter. ``beat`` is called for every picture; ``check_path``, which may raise, before a file is opened.
    Raises ``MissingSourceError`` if the folder does not exist (any more), and ``UserError`` if it holds no pictures.
    """
    names, passed_over = _list(folder)
    shown = 0
    for name in names:
        path = os.path.join(folder, name)
        check_path(path)
        try:
            pictures = _read_picture(path, size, decode=shown / fps >= begin - 1e-6)
        except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if not os.path.isdir(folder):
                raise MissingSourceError(f"the folder {folder} is not there") from None
            passed_over.append(name)
            continue
        beat()
        if pictures is not None:
            yield Frame(shown / fps, *pictures)
        shown += 1
    if not shown:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    if passed_over:
        listed = ", ".join(sorted(passed_over)[:3]) + (", …" if len(passed_over) > 3 else "")
        note(f"{len(passed_over)} of the files in the folder are not pictures and were passed over: {listed}")


def natural_order(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """A sort key that compares numbers in names by value: frame2 comes before frame10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(piece)) if piece.isdecimal() else (1, piece.casefold()) for piece in pieces], name


def _list(folder: str) -> tuple[list[str], list[str]]:
    """The names of files that may be pictures, in order, and of all other files that are not hidden."""
    try:
        files = [path.name for path in Path(folder).iterdir() if not path.name.startswith(".") and path.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        raise MissingSourceError(f"the folder {folder} is not there") from None
    except PermissionError:
        raise UserError(f"the folder {folder} may not be read; check its permissions") from None
    pictures = [name for name in files if Path(name).suffix.lower() in PICTURES]
    return sorted(pictures, key=natural_order), sorted(set(files) - set(pictures))


def _read_picture(path: str, size: int, decode: bool) -> tuple[np.ndarray, bytes] | None:
    """A picture's centre ``[size, size, 3]`` and a JPEG of the whole; without ``decode``, only open the file."""
    if decode:
        return centre_and_whole(Path(path), size, MAX_PIXELS, LOCAL_FORMATS)
    with Image.open(path, formats=LOCAL_FORMATS):
        return None
