"""Atomic writing of files and folders, and checksums."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty scratch file beside ``path``, and rename it into place at the end.

    Readers see the old file or the new one, never a partial file, and concurrent writers do not mix.
    If the block raises, ``path`` is unchanged and the scratch file is removed. The umask determines
    the file's permissions, as usual.

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
    """Write ``text`` as UTF-8 to ``path`` atomically."""
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


def set_aside(path: Path) -> Path:
    """Rename a file out of the way, never onto another; returns its new path, ``NAME.set-aside`` or one numbered."""
    number, aside = 1, path.with_suffix(".set-aside")
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".set-aside-{number}")
    return path.replace(aside)


def _scratch_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def folder_state(folder: Path) -> list[str]:
    """What changes when files of a folder do: its path, and its files' sizes and modification times."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), *(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)]


def remove_oldest(parent: Path, kept: int) -> None:
    """Remove all but the newest ``kept`` folders in ``parent``."""
    folders = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-kept]:
        shutil.rmtree(folder, ignore_errors=True)
