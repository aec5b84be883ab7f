"""A benchmark's questions from its data folder."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.evaluate.items import Benchmark, Item

SUBTITLE_LINES = 64
"""At most so many lines of subtitles come with a question, spread evenly over the video."""


def load_items(benchmark: Benchmark, data: Path) -> list[Item]:
    """Load the benchmark's questions from ``data``.

    Raises ``UserError`` when they are missing, or that names the record that is malformed or doubled.
    """
    paths = [data] if data.is_file() else [data / name for name in benchmark.files]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{data} holds no annotations of {benchmark.title}; it needs {' or '.join(benchmark.files)}"
            f" (from {benchmark.source})"
        )
    rows = _read_json(path, benchmark)
    try:
        items = benchmark.read(rows)
    except UserError as error:
        raise UserError(f"{path} is not an annotation file of {benchmark.title}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not an annotation file of {benchmark.title} ({type(error).__name__}: {error})"
        ) from None
    if not items:
        raise UserError(f"{path} holds no questions")
    doubled = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if doubled:
        shown = ", ".join(doubled[:5]) + (" …" if len(doubled) > 5 else "")
        raise UserError(f"{path} has several questions with the same id: {shown}")
    folder = data.parent if data.is_file() else data
    if benchmark.subtitles:
        items = [replace(item, context=subtitles(folder, item.video)) for item in items]
    return _of_chunks(items, benchmark, folder)


def _read_json(path: Path, benchmark: Benchmark) -> Any:
    """A JSON file in any of JSON's encodings, with or without a byte-order mark."""
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8, UTF-16 or UTF-32 (byte {error.start}); convert it") from None
    except ValueError as error:
        raise UserError(f"{path} is not an annotation file of {benchmark.title}: it is not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} is not an annotation file of {benchmark.title}: it is no list of records")
    return rows


def _of_chunks(items: list[Item], benchmark: Benchmark, folder: Path) -> list[Item]:
    """Items about the cuts that OVO-Bench publishes, one for each question, where the whole videos are missing."""
    chunks = folder / "chunked_videos"
    if benchmark.name != "ovobench" or not chunks.is_dir() or (folder / "src_videos").is_dir():
        return items
    return [replace(item, video=f"chunked_videos/{item.id}") for item in items]


def subtitles(folder: Path, video: str) -> str:
    """The subtitles of a video as context for a question; empty when it has none."""
    paths = [folder / name / f"{video}.srt" for name in ("subtitle", "subtitles")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return ""
    lines = [re.sub(r"<[^>]+>", "", line).strip() for line in _text(path).splitlines()]
    said = [line for line in lines if line and not line.isdigit() and "-->" not in line]
    if len(said) > SUBTITLE_LINES:
        said = [said[i * len(said) // SUBTITLE_LINES] for i in range(SUBTITLE_LINES)]
    return "\n".join(["Subtitles of the video:", *said])


def _text(path: Path) -> str:
    """A file as text: by its byte-order mark, else as UTF-8 or, where it is none, as Windows-1252."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def sharded(items: Sequence[Item], shard: str | None, limit: int | None) -> list[Item]:
    """The questions of shard ``i/n`` of the videos (i from 1), cut to the first ``limit``."""
    kept = list(items)
    if shard is not None:
        number, slash, count = shard.partition("/")
        if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard {shard} must be i/n with i from 1 to n, such as 2/4")
        videos = set(sorted({item.video for item in kept})[int(number) - 1 :: int(count)])
        kept = [item for item in kept if item.video in videos]
    return kept[:limit]
