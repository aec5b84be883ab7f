"""``search``: look for something in everything that the streams of a state folder remember."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flash_vstream.cli.options import Attn, Bits, Device, Dtype, Json, Memory, Model, Pair
from flash_vstream.cli.terminal import load_pipeline
from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice
from flash_vstream.timecode import format_time

if TYPE_CHECKING:
    from flash_vstream.serve.search import Found
    from flash_vstream.serve.transcript import Caption


def search(
    state: Annotated[Path, typer.Argument(help="A folder that serve --state keeps memories in.")],
    text: Annotated[str, typer.Argument(help='What to look for, such as "a red truck".')],
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many moments and captions at most.")] = 5,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Folder to write the moments' JPEGs to.")] = None,
    model: Model = "nano",
    memory: Memory = "star",
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    bits: Bits = None,
    pair: Pair = None,
    as_json: Json = False,
) -> None:
    """Look for something in the memories and transcripts of all streams of a state folder."""
    if not state.is_dir():
        raise UserError(f"{state} is not a folder; name one that flash-vstream serve --state has filled")
    if not text.strip():
        raise UserError('there is nothing to look for; say what, such as "a red truck"')
    pipeline = load_pipeline(ModelChoice(model, device, dtype, attn, bits, memory, pair=pair))
    from flash_vstream.serve.search import search_memories, search_transcript

    found = search_memories(state, text, pipeline, limit)
    captions = search_transcript(state, text, limit)
    files: list[Path | None] = [None] * len(found)
    if pictures is not None:
        files = _write(found, pictures)
    if as_json:
        moments = [own.to_dict() | {"picture": _shown(own, file)} for own, file in zip(found, files, strict=True)]
        print(json.dumps({"moments": moments, "captions": [caption.to_dict() for caption in captions]}))
        return
    _print(found, files, captions)


def _write(found: "list[Found]", folder: Path) -> list[Path | None]:
    """Write the pictures, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path | None] = []
    for own in found:
        path = folder / f"{own.stream}-{own.time:.0f}s.jpg" if own.picture is not None else None
        if path is not None and own.picture is not None:
            path.write_bytes(own.picture)
        files.append(path)
    return files


def _shown(own: "Found", file: Path | None) -> str | None:
    """A picture for JSON: its file, or without one a data URL."""
    if file is not None or own.picture is None:
        return str(file) if file is not None else None
    from flash_vstream.video.pictures import data_url

    return data_url(own.picture)


def _print(found: "list[Found]", files: list[Path | None], captions: "list[Caption]") -> None:
    console = Console(highlight=False, emoji=False)
    if not any(own.seen for own in found) and found[0].seen is not None:
        console.print("Nothing shows it for certain; the nearest:", style="dim")
    for own, file in zip(found, files, strict=True):
        doubt = "" if own.seen is None else f"  {own.score:.0%}" if own.seen else f"  {own.score:.0%}, not certain"
        picture = f"  {escape(str(file))}" if file is not None else ""
        line = f"[bold]{escape(own.stream)}[/bold]  {format_time(own.time)}{_date(own.clock)}{doubt}{picture}"
        console.print(line, soft_wrap=True)
    for caption in captions:
        line = f"[bold]{escape(caption.stream)}[/bold]  {format_time(caption.time)}{_date(caption.clock)}"
        console.print(f"{line}  “{escape(caption.text)}”", soft_wrap=True)


def _date(clock: float | None) -> str:
    return "" if clock is None else time.strftime("  %Y-%m-%d %H:%M:%S", time.localtime(clock))
