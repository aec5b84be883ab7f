"""Running a benchmark: one pass over each video, an answer when its moment comes, a line for each.

Protocols: ``causal`` answers as the stream reaches a question's end, from what came before;
``clip`` shows the marked segment alone; ``whole`` shows all of the video before any question. A
medium that is missing or does not decode makes its questions wrong and is listed; nothing is
replaced by anything else.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.evaluate.choices import parse_choice
from flash_vstream.evaluate.items import Benchmark, Item
from flash_vstream.evaluate.media import features_of, find_medium
from flash_vstream.evaluate.readers import Reader
from flash_vstream.memory import StarConfig
from flash_vstream.models.answering import Prefix
from flash_vstream.stream import FlashVStream

PROTOCOLS = ("causal", "clip", "whole")
CHOICE_TOKENS = 12
OPEN_TOKENS = 64
BATCH = 16
"""The most questions that are answered together: those of one moment, or blind ones of like length."""
Stream = Iterable[tuple[float, Tensor]]
Done = Mapping[str, dict[str, Any]]
"""Predictions by the id of their question; it grows while a run goes on."""


@dataclass(frozen=True)
class Run:
    """What one evaluation is: everything that its predictions depend on."""

    benchmark: str
    model: str
    reader: str
    protocol: str
    fps: float
    star: StarConfig | None = None

    def key(self) -> dict[str, Any]:
        """The fields that every line of predictions carries."""
        known = asdict(self)
        known["star"] = self.star.to_dict() if self.star is not None else None
        return known


def load_items(benchmark: Benchmark, data: Path) -> list[Item]:
    """The benchmark's questions under ``data``; raises ``UserError`` naming what is missing or odd."""
    paths = [data] if data.is_file() else [data / name for name in benchmark.files]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{data} holds no annotations of {benchmark.title}; it needs {' or '.join(benchmark.files)}"
            f" (from {benchmark.source})"
        )
    try:
        items = benchmark.read(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not an annotation file of {benchmark.title} ({type(error).__name__}: {error})"
        ) from None
    doubled = len(items) - len({item.id for item in items})
    if doubled or not items:
        raise UserError(f"{path} holds {len(items)} questions, {doubled} of them with an id of another")
    return items


def sharded(items: Sequence[Item], shard: str | None, limit: int | None) -> list[Item]:
    """The part ``i/n`` of the videos (i from 1), and of those the first ``limit`` questions."""
    kept = list(items)
    if shard is not None:
        number, slash, count = shard.partition("/")
        if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard {shard} must be i/n with i from 1 to n, such as 2/4")
        videos = sorted({item.video for item in kept})[int(number) - 1 :: int(count)]
        kept = [item for item in kept if item.video in set(videos)]
    return kept[:limit]


def done_already(path: Path, run: Run) -> dict[str, dict[str, Any]]:
    """Predictions that an earlier run left in ``path``; a line that a kill cut short is dropped.

    Raises ``UserError`` when they are another run's.
    """
    if not path.exists():
        return {}
    rows, whole = {}, []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["run"] != run.key():
            raise UserError(f"{path} holds predictions of another run ({row['run']}); name another --output")
        rows[row["id"]] = row
        whole.append(line)
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(line + "\n" for line in whole))
    scratch.replace(path)
    return rows


def run_benchmark(
    run: Run, benchmark: Benchmark, items: Sequence[Item], data: Path, model: FlashVStream, output: Path
) -> list[dict[str, Any]]:
    """Answer what ``output`` does not hold yet; returns every prediction in the items' order."""
    if run.protocol not in PROTOCOLS:
        raise UserError(f"no protocol is called {run.protocol!r}; choose from {', '.join(PROTOCOLS)}")
    reader = Reader(run.reader, model.network, run.star)  # one that does not exist is told before anything else
    output.parent.mkdir(parents=True, exist_ok=True)
    done = done_already(output, run)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, output.open("a") as file:
        task = progress.add_task(
            f"{run.benchmark} {run.reader}", total=len(items), completed=sum(item.id in done for item in items)
        )
        rows = (
            _blind(run, items, done, model) if reader.is_blind else _by_video(run, benchmark, items, done, data, model)
        )
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["id"]] = row
            progress.advance(task)
    return [done[item.id] for item in items]


def _blind(run: Run, items: Sequence[Item], done: Done, model: FlashVStream) -> Iterator[dict[str, Any]]:
    """Predictions from the questions alone, in batches of like length."""
    prefix = model.answerer.read(None)
    for item, text, timing in _together(sorted(items, key=lambda item: len(item.prompt)), done, prefix, model):
        yield _row(run, item, None, 0, text, None, timing)


def _by_video(
    run: Run, benchmark: Benchmark, items: Sequence[Item], done: Done, data: Path, model: FlashVStream
) -> Iterator[dict[str, Any]]:
    """Predictions of one video after another."""
    videos: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        videos[item.video].append(item)
    folder = data.parent if data.is_file() else data
    for video, asked in videos.items():
        if any(item.id not in done for item in asked):
            yield from _answer_video(run, benchmark, folder, video, asked, done, model)


def _answer_video(
    run: Run, benchmark: Benchmark, data: Path, video: str, asked: list[Item], done: Done, model: FlashVStream
) -> Iterator[dict[str, Any]]:
    """Predictions about one video; when it breaks off with an error, the rest are wrong and say why."""
    left = {item.id: item for item in asked if item.id not in done}
    error = "no question was reached"
    try:
        for item, row in _pass(run, benchmark, data, video, asked, done, model):
            del left[item.id]
            yield row
    except UserError as failed:
        error = str(failed)
    for item in left.values():
        yield _row(run, item, None, 0, None, error)


def _pass(
    run: Run, benchmark: Benchmark, data: Path, video: str, asked: list[Item], done: Done, model: FlashVStream
) -> Iterator[tuple[Item, dict[str, Any]]]:
    def new_reader() -> Reader:
        return Reader(run.reader, model.network, run.star)

    path = find_medium(data, benchmark.media, video)
    if path is None:
        raise UserError(f"no medium called {video} in {' or '.join(str(data / folder) for folder in benchmark.media)}")
    ends = [item.end for item in asked]
    last = None if run.protocol == "whole" or None in ends else max(end for end in ends if end is not None)
    stream = features_of(model, path, run.fps, last)
    if run.protocol == "causal":
        yield from _causal(run, asked, done, new_reader(), model, stream)
    elif run.protocol == "whole":
        reader, newest = new_reader(), None
        for newest, feature in stream:
            reader.write(newest, feature)
        yield from _ask_all(run, asked, done, reader, model, newest)
    else:
        yield from _clips(run, asked, done, new_reader, model, stream)


def _causal(
    run: Run, asked: list[Item], done: Done, reader: Reader, model: FlashVStream, stream: Stream
) -> Iterator[tuple[Item, dict[str, Any]]]:
    waiting = sorted(asked, key=lambda item: float("inf") if item.end is None else item.end)
    newest: float | None = None
    for moment, feature in stream:
        due = [item for item in waiting if item.end is not None and item.end < moment]
        if due:
            yield from _ask_all(run, due, done, reader, model, newest)
            waiting = waiting[len(due) :]
        reader.write(moment, feature)
        newest = moment
    yield from _ask_all(run, waiting, done, reader, model, newest)


def _clips(
    run: Run, asked: list[Item], done: Done, new_reader: Callable[[], Reader], model: FlashVStream, stream: Stream
) -> Iterator[tuple[Item, dict[str, Any]]]:
    frames = [(moment, feature.half()) for moment, feature in stream]
    segments: dict[tuple[float | None, float | None], list[Item]] = defaultdict(list)
    for item in asked:
        segments[(item.start, item.end)].append(item)
    for (start, end), items in segments.items():
        reader, newest = new_reader(), None
        for moment, feature in frames:
            if (start is None or moment >= start) and (end is None or moment <= end):
                reader.write(moment, feature)
                newest = moment
        yield from _ask_all(run, items, done, reader, model, newest)


def _ask_all(
    run: Run, items: Sequence[Item], done: Done, reader: Reader, model: FlashVStream, newest: float | None
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Ask several questions of what the reader holds, which is read once."""
    left = [item for item in items if item.id not in done]
    if not left:
        return
    if not reader.frames:
        for item in left:
            yield item, _row(run, item, newest, 0, None, "no frame lies before the question")
        return
    begun = time.perf_counter()
    prefix = model.answerer.read(reader.view(), reader.time_stamps)
    read = round(time.perf_counter() - begun, 4)
    for item, text, timing in _together(items, done, prefix, model):
        yield item, _row(run, item, newest, reader.frames, text, None, {"read_seconds": read, **timing})


def _together(
    items: Sequence[Item], done: Done, prefix: Prefix, model: FlashVStream
) -> Iterator[tuple[Item, str, dict[str, float]]]:
    """Texts and timings of the questions that are not done, answered in batches.

    Rounding depends a little on what else is in a batch. So a batch that a kill cut short is answered
    again as it was, and questions of different moments never share one.
    """
    for begin in range(0, len(items), BATCH):
        batch = items[begin : begin + BATCH]
        if all(item.id in done for item in batch):
            continue
        begun = time.perf_counter()
        most = CHOICE_TOKENS if batch[0].choices else OPEN_TOKENS  # a benchmark's questions are of one sort
        texts = model.answerer.ask_all(prefix, [item.prompt for item in batch], most)
        timing = {"batch_seconds": round(time.perf_counter() - begun, 4), "batch": len(batch)}
        for item, text in zip(batch, texts, strict=True):
            if item.id not in done:
                yield item, text, timing


def _row(
    run: Run,
    item: Item,
    newest: float | None,
    frames: int,
    prediction: str | None,
    error: str | None,
    timing: dict[str, float] | None = None,
) -> dict[str, Any]:
    """A prediction with all that is needed to judge it again."""
    row: dict[str, Any] = {**asdict(item), "choices": list(item.choices), "prompt": item.prompt}
    row |= {"prediction": prediction, "error": error, "stream_time": newest, "frames": frames, "timing": timing}
    if item.choices:
        row["chosen"] = parse_choice(prediction, item.choices) if prediction is not None else None
    return row | {"run": run.key(), "version": __version__, "decoding": "greedy", "seed": 0}
