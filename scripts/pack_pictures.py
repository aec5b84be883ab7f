#!/usr/bin/env python3
"""Pack annotated picture sets into pieces for another machine.

scripts/pack_pictures.py OUTPUT SET [SET ...]

Every SET is a folder with annotations.jsonl and either pictures (captions.json, splits.json, tar files or loose) or
clips. OUTPUT becomes one picture set: captions.json, splits.json, annotations.jsonl and tar files of at most
52 MB with the pictures of the splits train and val as WebP. Of each clip that
is not held out, six frames become pictures of train with the clip's annotation.
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.progress import track

from flash_vstream.synthetic.annotations import read_annotations
from flash_vstream.synthetic.captions import pictures_in
from flash_vstream.synthetic.clips import frames_of_clips, held_out

PIECE = 52_000_000
QUALITY = 65
SIZE = 256
FRAMES = 6
"""Frames of a clip that become pictures."""
Picture = tuple[str, Image.Image]


class Pieces:
    """Tar files of at most ``PIECE`` bytes each, written one after another."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.size = folder, 0, PIECE
        self.tar: tarfile.TarFile | None = None

    def add(self, name: str, picture: Image.Image) -> None:
        """Append a picture; begins the next file when this one is full."""
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
        data = buffer.getvalue()
        if self.tar is None or self.size + len(data) + 1024 > PIECE:
            self.close()
            path = self.folder / f"pictures-{self.count:02}.tar"
            self.tar, self.size = tarfile.open(path, "w"), 0  # noqa: SIM115 - closed by close()
            self.count += 1
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self.tar.addfile(entry, io.BytesIO(data))
        self.size += 512 + (len(data) + 511) // 512 * 512

    def close(self) -> None:
        """Finish the last file."""
        if self.tar is not None:
            self.tar.close()


def read_pictures(folder: Path, captions: dict, splits: dict, rows: list[dict]) -> Iterator[Picture]:
    """The pictures of a set's train and val splits; adds to ``captions``, ``splits`` and annotation ``rows``."""
    own = json.loads((folder / "captions.json").read_text())
    keys = {
        split: names for split, names in json.loads((folder / "splits.json").read_text()).items() if split in splits
    }
    for split, names in keys.items():
        splits[split] += names
        captions.update({name: own[name] for name in names})
    rows += [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    yield from pictures_in(folder, {name for names in keys.values() for name in names})


def read_clips(folder: Path, captions: dict, splits: dict, rows: list[dict]) -> Iterator[Picture]:
    """Frames of a set's clips that are not held out, as pictures of the split train."""
    annotations = read_annotations(folder / "annotations.jsonl")
    source = {row["clip"]: row for row in map(json.loads, (folder / "annotations.jsonl").read_text().splitlines())}
    shown = frames_of_clips(folder, sorted(set(annotations) - set(held_out(annotations))), 4.0, SIZE)
    for key, frames in shown.items():
        count = min(FRAMES, len(frames))
        for number in range(count):
            name = f"{key}-{number}.jpg"
            splits["train"].append(name)
            captions[name] = [source[key]["caption"], source[key]["short"]]
            rows.append({**source[key], "image": name})
            yield name, Image.fromarray(frames[number * (len(frames) - 1) // max(1, count - 1)])


def main() -> None:
    """Pack the sets named on the command line."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    output, *sets = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    captions: dict = {}
    splits: dict = {"train": [], "val": []}
    rows: list[dict] = []
    pieces = Pieces(output)
    for folder in sets:
        read = read_pictures if (folder / "captions.json").exists() else read_clips
        for name, picture in track(read(folder, captions, splits, rows), f"packing {folder.name}"):
            pieces.add(name, picture)
    pieces.close()
    (output / "captions.json").write_text(json.dumps(captions))
    (output / "splits.json").write_text(json.dumps(splits))
    (output / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
