"""Files and folders that appear whole or not at all, and checksums."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give the path of an empty scratch file beside ``path``, and rename it into place at the end.

    Readers see the old file or the new one, never a part of it, and two writers at once do not mix.
    When the block raises, ``path`` stays as it was and the scratch file is removed. The umask decides
    the file's permissions, as for any other file.

    >>> with atomic_write("weights.safetensors") as scratch:
    ...     save_file(tensors, scratch)
    """
    scratch = _scratch_path(Path(path))
    scratch.touch(exist_ok=False)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """``atomic_write`` for a folder; ``path`` must not exist yet, or be empty."""
    scratch = _scratch_path(Path(path))
    scratch.mkdir()
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
