"""Run a benchmark: one pass over each video, and one line of output per answer.

Protocols: ``causal`` answers when the stream reaches a question's end, from what came before it;
``clip`` shows only the marked segment; ``whole`` shows the entire video before any question. If a
medium is missing or cannot be decoded, its questions count as wrong and the failure is reported;
nothing is substituted.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.choices import ABSTAINED, read_choice
from flash_vstream.evaluate.items import Benchmark, Item
from flash_vstream.evaluate.media import features_of, find_medium
from flash_vstream.evaluate.records import read_predictions
from flash_vstream.evaluate.scoring import POLL_SECONDS, POLLED_AFTER, poll, says_yes
from flash_vstream.files import write_text_atomically
from flash_vstream.memory import StarConfig
from flash_vstream.models.answer import Prefix
from flash_vstream.pipeline import FlashVStream

PROTOCOLS = ("causal", "clip", "whole")
MAX_REPLY_TOKENS = 64
POLL_TOKENS = 8
CHOOSING = ("reply", "likelihood")
"""How a choice is made: the model's reply is read, or the likeliest option is taken."""
BATCH = 16
"""The maximum number of questions in a batch: those of one moment, or blind ones of similar length."""
SHORT_SECONDS = 2.0
"""How long before a question's time a video may end, plus one frame interval; annotations are rounded."""
TOO_SHORT = "the video ends before the question's time"
Stream = Iterable[tuple[float, Tensor]]


@dataclass(frozen=True)
class Run:
    """The settings of an evaluation: everything that its predictions depend on.

    ``choice_by`` is one of ``CHOOSING``. ``weights`` is the model's ``weights_hash``, so that predictions of a
    model are never mixed with those of a retrained one under the same name. ``engine`` runs the language model, and
    may round its weights. ``star`` is the memory configuration, or None for the model's own.
    """

    benchmark: str
    model: str
    memory: str
    protocol: str
    fps: float
    star: StarConfig | None = None
    weights: str = ""
    choice_by: str = "reply"
    engine: str = ""

    def key(self) -> dict[str, Any]:
        """The fields stored with every prediction, including the package version."""
        values = asdict(self)
        values["star"] = self.star.to_dict() if self.star is not None else None
        return values | {"version": __version__}


def done_already(path: Path, run: Run, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Predictions that an earlier run left in ``path``, without failed ones, which are retried.

    Drops a last line cut short by a kill. Raises ``UserError`` and leaves the file unchanged when it
    contains anything other than predictions of this run, or some about other questions of the same ids.
    """
    if not path.exists():
        return {}
    rows = {}
    asked = {item.id: json.loads(json.dumps(asdict(item))) for item in items}
    for row in read_predictions(path, "name another --output"):
        if row["run"] != run.key():
            changed = [name for name, value in run.key().items() if row["run"].get(name) != value]
            raise UserError(
                f"{path} holds predictions of another run ({', '.join(changed)} differ); move it away, or name another"
                " --output"
            )
        changed = [name for name, value in asked.get(row["id"], {}).items() if row.get(name) != value]
        if changed:
            raise UserError(
                f"{path} holds predictions about other annotations ({', '.join(changed)} of {row['id']} differ); move"
                " it away, or name another --output"
            )
        if row["error"] is None:
            rows[row["id"]] = row
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
    return rows


def weights_hash(model: torch.nn.Module) -> str:
    """The first 16 hex digits of a SHA-256 over a model's weights, names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def run_benchmark(
    run: Run, benchmark: Benchmark, items: Sequence[Item], data: Path, pipeline: FlashVStream, output: Path
) -> list[dict[str, Any]]:
    """Answer the questions not yet in ``output``; return all predictions in the order of ``items``."""
    if run.protocol not in PROTOCOLS:
        raise UserError(f"no protocol is called {run.protocol!r}; choose from {', '.join(PROTOCOLS)}")
    if run.protocol != "causal" and any(item.scoring == "proactive" for item in items):
        raise UserError("answers that must come by themselves need --protocol causal")
    method = MemoryMethod(run.memory, pipeline.model, run.star)  # fails early on an unknown name
    output.parent.mkdir(parents=True, exist_ok=True)
    done = done_already(output, run, items)
    runner = _Runner(run, benchmark, data.parent if data.is_file() else data, pipeline, done)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, output.open("a") as file:
        task = progress.add_task(
            f"{run.benchmark} {run.memory}", total=len(items), completed=sum(item.id in done for item in items)
        )
        for row in runner.blind(items) if method.is_blind else runner.by_video(items):
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["id"]] = row
            progress.advance(task)
    return [done[item.id] for item in items]


@dataclass(frozen=True)
class _Runner:
    """Makes the predictions of a run that are not ``done`` yet, from the media under ``folder``.

    The caller must add each prediction to ``done``, by question id, before it takes the next.
    """

    run: Run
    benchmark: Benchmark
    folder: Path
    pipeline: FlashVStream
    done: Mapping[str, dict[str, Any]]

    def blind(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """Predictions from the questions without video, in batches of similar length."""
        prefix = self.pipeline.generator.read(None)
        asked = [item for item in items if item.scoring != "proactive"]
        for item, reply in self._together(sorted(asked, key=lambda item: len(item.prompt)), prefix):
            yield _row(self.run, item, None, 0, reply)
        for item in items:  # who sees nothing says yes or no to every poll, so the first one decides
            if item.scoring == "proactive" and item.id not in self.done:
                answer = self._polled(item, prefix)
                at = _poll_moments(item)[0] if answer is not None else None
                yield _row(self.run, item, None, 0, answer or Reply("")) | {"answered_at": at}

    def by_video(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """Predictions, video by video."""
        videos: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            videos[item.video].append(item)
        for video, of_video in videos.items():
            if any(item.id not in self.done for item in of_video):
                yield from self._video(video, of_video)

    def _new_method(self) -> MemoryMethod:
        return MemoryMethod(self.run.memory, self.pipeline.model, self.run.star)

    def _video(self, video: str, items: list[Item]) -> Iterator[dict[str, Any]]:
        """Predictions about one video; after an error, the remaining ones count as wrong and carry the error."""
        left = {item.id: item for item in items if item.id not in self.done}
        error = "no question was reached"
        try:
            for row in self._pass(video, items):
                del left[row["id"]]
                yield row
        except UserError as failed:
            error = str(failed)
        for item in left.values():
            yield _row(self.run, item, None, 0, Reply(None, error))

    def _pass(self, video: str, items: list[Item]) -> Iterator[dict[str, Any]]:
        path = find_medium(self.folder, self.benchmark.media, video)
        if path is None:
            folders = " or ".join(str(self.folder / folder) for folder in self.benchmark.media)
            raise UserError(f"no medium called {video} in {folders}")
        ends = [_last_moment(item) for item in items]
        last = None if self.run.protocol == "whole" or None in ends else max(end for end in ends if end is not None)
        stream = features_of(self.pipeline, path, self.run.fps, last)
        if self.run.protocol == "causal":
            yield from self._causal(items, stream)
        elif self.run.protocol == "whole":
            method, newest = self._new_method(), None
            for newest, feature in stream:
                method.write(newest, feature)
            yield from self._ask_in_time(items, method, newest, newest)
        else:
            yield from self._clips(items, stream)

    def _causal(self, items: list[Item], stream: Stream) -> Iterator[dict[str, Any]]:
        waiting = sorted(
            (item for item in items if item.scoring != "proactive"),
            key=lambda item: float("inf") if item.end is None else item.end,
        )
        polls = sorted(
            ((moment, item) for item in items if item.scoring == "proactive" for moment in _poll_moments(item)),
            key=lambda poll: poll[0],
        )
        method, newest = self._new_method(), None
        answered: set[str] = set()
        for moment, feature in stream:
            due = [item for item in waiting if item.end is not None and item.end < moment]
            if due:
                yield from self._ask_all(due, method, newest)
                waiting = waiting[len(due) :]
            while polls and polls[0][0] < moment:
                yield from self._poll(*polls.pop(0), method, newest, answered)
            method.write(moment, feature)
            newest = moment
        for at, item in polls:
            if newest is not None and at <= newest + self._slack:
                yield from self._poll(at, item, method, newest, answered)
            elif item.id not in answered and item.id not in self.done:
                answered.add(item.id)
                yield _row(self.run, item, newest, method.frames, Reply(None, TOO_SHORT))
        yield from self._ask_in_time(waiting, method, newest, newest)

    @property
    def _slack(self) -> float:
        return SHORT_SECONDS + 1 / self.run.fps

    def _poll(
        self, at: float, item: Item, method: MemoryMethod, newest: float | None, answered: set[str]
    ) -> Iterator[dict[str, Any]]:
        """Ask at ``at`` whether to answer now; yields the row when the model says yes, or at the last poll."""
        if item.id in answered or item.id in self.done or not method.frames:
            return
        prefix = self.pipeline.generator.read(method.snapshot(), method.time_stamps)
        reply = self._polled(item, prefix)
        if reply is not None or at == _poll_moments(item)[-1]:
            answered.add(item.id)
            row = _row(self.run, item, newest, method.frames, reply or Reply(""))
            yield row | {"answered_at": at if reply is not None else None}

    def _polled(self, item: Item, prefix: Prefix) -> "Reply | None":
        """The model's answer if it says that it is time for one."""
        asked = poll(item.question, item.answer)
        if not says_yes(self.pipeline.generator.ask_many(prefix, [asked], POLL_TOKENS)[0]):
            return None
        return Reply(self.pipeline.generator.ask_many(prefix, [item.question], MAX_REPLY_TOKENS)[0])

    def _clips(self, items: list[Item], stream: Stream) -> Iterator[dict[str, Any]]:
        frames = [(moment, feature.half()) for moment, feature in stream]
        segments: dict[tuple[float | None, float | None], list[Item]] = defaultdict(list)
        for item in items:
            segments[(item.start, item.end)].append(item)
        for (start, end), of_segment in segments.items():
            method, newest = self._new_method(), None
            for moment, feature in frames:
                if (start is None or moment >= start) and (end is None or moment <= end):
                    method.write(moment, feature)
                    newest = moment
            yield from self._ask_in_time(of_segment, method, newest, frames[-1][0] if frames else None)

    def _ask_in_time(
        self, items: Sequence[Item], method: MemoryMethod, newest: float | None, video_end: float | None
    ) -> Iterator[dict[str, Any]]:
        """Ask the questions that the video reaches; the rest fail because their moment is never shown."""
        late = [
            item
            for item in items
            if item.end is not None and video_end is not None and item.end > video_end + self._slack
        ]
        for item in late:
            if item.id not in self.done:
                yield _row(self.run, item, newest, method.frames, Reply(None, TOO_SHORT))
        yield from self._ask_all([item for item in items if item not in late], method, newest)

    def _ask_all(self, items: Sequence[Item], method: MemoryMethod, newest: float | None) -> Iterator[dict[str, Any]]:
        """Ask several questions about the current memory, which is read once."""
        left = [item for item in items if item.id not in self.done]
        if not left:
            return
        if not method.frames:
            for item in left:
                yield _row(self.run, item, newest, 0, Reply(None, "no frame lies before the question"))
            return
        started = time.perf_counter()
        prefix = self.pipeline.generator.read(method.snapshot(), method.time_stamps)
        read = round(time.perf_counter() - started, 4)
        for item, reply in self._together(items, prefix):
            timing = {"read_seconds": read, **(reply.timing or {})}
            yield _row(self.run, item, newest, method.frames, replace(reply, timing=timing))

    def _together(self, items: Sequence[Item], prefix: Prefix) -> Iterator[tuple[Item, "Reply"]]:
        """Replies to the questions that are not done, answered in batches.

        Rounding depends slightly on the rest of a batch. Therefore a batch interrupted by a kill is
        answered again in full, and questions of different moments never share a batch.
        """
        for begin in range(0, len(items), BATCH):
            batch = items[begin : begin + BATCH]
            if all(item.id in self.done for item in batch):
                continue
            started = time.perf_counter()
            replies = self._replies(batch, prefix)
            timing = {"batch_seconds": round(time.perf_counter() - started, 4), "batch": len(batch)}
            for item, reply in zip(batch, replies, strict=True):
                if item.id not in self.done:
                    yield item, replace(reply, timing=timing)

    def _replies(self, batch: Sequence[Item], prefix: Prefix) -> list["Reply"]:
        generator = self.pipeline.generator
        by_likelihood = [bool(item.choices) and self.run.choice_by == "likelihood" for item in batch]
        prompts = [item.prompt for item, scored in zip(batch, by_likelihood, strict=True) if not scored]
        texts = iter(generator.ask_many(prefix, prompts, MAX_REPLY_TOKENS))
        replies = []
        for item, scored in zip(batch, by_likelihood, strict=True):
            if scored:
                asked = item.asked if item.question.strip() else item.prompt
                scores = generator.likelihoods(prefix, asked, item.choices)
                chosen = scores.index(max(scores))
                replies.append(Reply(item.choices[chosen], chosen=chosen, likelihoods=scores))
            else:
                replies.append(Reply(next(texts)))
        return replies


def _poll_moments(item: Item) -> list[float]:
    """When a proactive question is polled: every second after it was asked, until some seconds after it is due."""
    assert item.start is not None
    assert item.end is not None
    count = int((item.end + POLLED_AFTER - item.start) / POLL_SECONDS)
    return [item.start + POLL_SECONDS * (i + 1) for i in range(max(1, count))]


def _last_moment(item: Item) -> float | None:
    """Until when a video must be watched for a question; None: to its end."""
    return _poll_moments(item)[-1] if item.scoring == "proactive" else item.end


@dataclass(frozen=True)
class Reply:
    """What a model replied, or the ``error`` that kept it from it; ``chosen`` by the ``likelihoods`` of the options."""

    text: str | None
    error: str | None = None
    timing: dict[str, float] | None = None
    chosen: int | None = None
    likelihoods: list[float] | None = None


def _row(run: Run, item: Item, newest: float | None, frames: int, reply: Reply) -> dict[str, Any]:
    """A prediction with everything needed to judge it again."""
    row: dict[str, Any] = {**asdict(item), "choices": list(item.choices), "prompt": item.prompt}
    row |= {"prediction": reply.text, "error": reply.error, "stream_time": newest, "frames": frames}
    row["timing"] = reply.timing
    if reply.likelihoods is not None:
        row |= {"chosen": reply.chosen, "rule": "likelihood", "likelihoods": reply.likelihoods}
    elif item.choices:
        reading = read_choice(reply.text, item.choices) if reply.text is not None else ABSTAINED
        row |= {"chosen": reading.index, "rule": reading.rule}
    return row | {"run": run.key(), "version": __version__, "decoding": "greedy", "seed": 0}
