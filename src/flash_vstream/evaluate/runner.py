"""Running a benchmark: one pass over each video, an answer when its moment comes, a line for each.

Protocols: ``causal`` answers as the stream reaches a question's end, from what came before;
``clip`` shows the marked segment alone; ``whole`` shows all of the video before any question. A
medium that is missing or does not decode makes its questions wrong and is listed; nothing is
replaced by anything else.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.choices import parse_choice
from flash_vstream.evaluate.items import Benchmark, Item
from flash_vstream.evaluate.media import features_of, find_medium
from flash_vstream.files import write_text_atomically
from flash_vstream.memory import StarConfig
from flash_vstream.models.generation import Prefix
from flash_vstream.pipeline import FlashVStream

PROTOCOLS = ("causal", "clip", "whole")
CHOICE_TOKENS = 12
OPEN_TOKENS = 64
BATCH = 16
"""The most questions that are answered together: those of one moment, or blind ones of like length."""
Stream = Iterable[tuple[float, Tensor]]


@dataclass(frozen=True)
class Run:
    """What one evaluation is: everything that its predictions depend on."""

    benchmark: str
    model: str
    memory: str
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
    write_text_atomically(path, "".join(line + "\n" for line in whole))
    return rows


def run_benchmark(
    run: Run, benchmark: Benchmark, items: Sequence[Item], data: Path, pipeline: FlashVStream, output: Path
) -> list[dict[str, Any]]:
    """Answer what ``output`` does not hold yet; returns every prediction in the items' order."""
    if run.protocol not in PROTOCOLS:
        raise UserError(f"no protocol is called {run.protocol!r}; choose from {', '.join(PROTOCOLS)}")
    method = MemoryMethod(run.memory, pipeline.model, run.star)  # one that does not exist is told before anything else
    output.parent.mkdir(parents=True, exist_ok=True)
    done = done_already(output, run)
    asking = _Asking(run, benchmark, data.parent if data.is_file() else data, pipeline, done)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, output.open("a") as file:
        task = progress.add_task(
            f"{run.benchmark} {run.memory}", total=len(items), completed=sum(item.id in done for item in items)
        )
        for row in asking.blind(items) if method.is_blind else asking.by_video(items):
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["id"]] = row
            progress.advance(task)
    return [done[item.id] for item in items]


@dataclass(frozen=True)
class _Asking:
    """A run on its way: the media under ``folder``, the model, and the predictions by question that are ``done``.

    Who takes a prediction puts it into ``done`` before the next.
    """

    run: Run
    benchmark: Benchmark
    folder: Path
    pipeline: FlashVStream
    done: Mapping[str, dict[str, Any]]

    def blind(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """Predictions from the questions alone, in batches of like length."""
        prefix = self.pipeline.generator.read(None)
        for item, text, timing in self._together(sorted(items, key=lambda item: len(item.prompt)), prefix):
            yield _row(self.run, item, None, 0, text, None, timing)

    def by_video(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """Predictions of one video after another."""
        videos: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            videos[item.video].append(item)
        for video, asked in videos.items():
            if any(item.id not in self.done for item in asked):
                yield from self._video(video, asked)

    def _new_method(self) -> MemoryMethod:
        return MemoryMethod(self.run.memory, self.pipeline.model, self.run.star)

    def _video(self, video: str, asked: list[Item]) -> Iterator[dict[str, Any]]:
        """Predictions about one video; when it breaks off with an error, the rest are wrong and say why."""
        left = {item.id: item for item in asked if item.id not in self.done}
        error = "no question was reached"
        try:
            for row in self._pass(video, asked):
                del left[row["id"]]
                yield row
        except UserError as failed:
            error = str(failed)
        for item in left.values():
            yield _row(self.run, item, None, 0, None, error)

    def _pass(self, video: str, asked: list[Item]) -> Iterator[dict[str, Any]]:
        path = find_medium(self.folder, self.benchmark.media, video)
        if path is None:
            folders = " or ".join(str(self.folder / folder) for folder in self.benchmark.media)
            raise UserError(f"no medium called {video} in {folders}")
        ends = [item.end for item in asked]
        last = None if self.run.protocol == "whole" or None in ends else max(end for end in ends if end is not None)
        stream = features_of(self.pipeline, path, self.run.fps, last)
        if self.run.protocol == "causal":
            yield from self._causal(asked, stream)
        elif self.run.protocol == "whole":
            method, newest = self._new_method(), None
            for newest, feature in stream:
                method.write(newest, feature)
            yield from self._ask_all(asked, method, newest)
        else:
            yield from self._clips(asked, stream)

    def _causal(self, asked: list[Item], stream: Stream) -> Iterator[dict[str, Any]]:
        waiting = sorted(asked, key=lambda item: float("inf") if item.end is None else item.end)
        method, newest = self._new_method(), None
        for moment, feature in stream:
            due = [item for item in waiting if item.end is not None and item.end < moment]
            if due:
                yield from self._ask_all(due, method, newest)
                waiting = waiting[len(due) :]
            method.write(moment, feature)
            newest = moment
        yield from self._ask_all(waiting, method, newest)

    def _clips(self, asked: list[Item], stream: Stream) -> Iterator[dict[str, Any]]:
        frames = [(moment, feature.half()) for moment, feature in stream]
        segments: dict[tuple[float | None, float | None], list[Item]] = defaultdict(list)
        for item in asked:
            segments[(item.start, item.end)].append(item)
        for (start, end), items in segments.items():
            method, newest = self._new_method(), None
            for moment, feature in frames:
                if (start is None or moment >= start) and (end is None or moment <= end):
                    method.write(moment, feature)
                    newest = moment
            yield from self._ask_all(items, method, newest)

    def _ask_all(self, items: Sequence[Item], method: MemoryMethod, newest: float | None) -> Iterator[dict[str, Any]]:
        """Ask several questions of what the reader holds, which is read once."""
        left = [item for item in items if item.id not in self.done]
        if not left:
            return
        if not method.frames:
            for item in left:
                yield _row(self.run, item, newest, 0, None, "no frame lies before the question")
            return
        begun = time.perf_counter()
        prefix = self.pipeline.generator.read(method.snapshot(), method.time_stamps)
        read = round(time.perf_counter() - begun, 4)
        for item, text, timing in self._together(items, prefix):
            yield _row(self.run, item, newest, method.frames, text, None, {"read_seconds": read, **timing})

    def _together(self, items: Sequence[Item], prefix: Prefix) -> Iterator[tuple[Item, str, dict[str, float]]]:
        """Texts and timings of the questions that are not done, answered in batches.

        Rounding depends a little on what else is in a batch. So a batch that a kill cut short is answered
        again as it was, and questions of different moments never share one.
        """
        for begin in range(0, len(items), BATCH):
            batch = items[begin : begin + BATCH]
            if all(item.id in self.done for item in batch):
                continue
            begun = time.perf_counter()
            most = CHOICE_TOKENS if batch[0].choices else OPEN_TOKENS  # a benchmark's questions are of one sort
            texts = self.pipeline.generator.ask_many(prefix, [item.prompt for item in batch], most)
            timing = {"batch_seconds": round(time.perf_counter() - begun, 4), "batch": len(batch)}
            for item, text in zip(batch, texts, strict=True):
                if item.id not in self.done:
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
