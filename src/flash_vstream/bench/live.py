"""``bench live`` and ``bench soak``: watching and answering at the same time, measured from outside the workers."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from flash_vstream.live.question_client import QuestionClient
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.streams import LiveStreams
from flash_vstream.models.hub import fetch_model
from flash_vstream.sample_clips import CLIPS, STREET
from flash_vstream.video.sources import Source
from flash_vstream.wheels import fetch

QUESTION = "What is happening now?"
SETTLE_SECONDS = 10.0
SOAK_PAUSE_SECONDS = 1.0
"""Pause between questions of a soak, so that watching gets most of the cores."""


@contextmanager
def workers(model: str) -> Iterator[tuple[LiveStreams, QuestionClient]]:
    """Both workers of a model, which is fetched first if necessary."""
    with Console(stderr=True).status(f"loading {model}") as status:
        fetch_model(model, status.update)
    with LiveStreams(model) as live:
        question_client = QuestionClient(model)
        try:
            yield live, question_client
        finally:
            question_client.close()


def clip(number: int, fps: float, pace: str = "real") -> Source:
    """A sample clip in a loop."""
    return Source(str(fetch(list(CLIPS))[number % len(CLIPS)]), fps, loop=True, pace=pace)


def shown_state(live: LiveStreams, name: str) -> SharedTensors:
    """Wait for a stream's first frame; returns its shared state."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if live.status(name).time is not None:
            return live.shared_state(name)
        time.sleep(0.02)
    raise TimeoutError(f"no frame of {name} came within 60 s")


def long_question(scene: int = 1) -> str:
    """A question that nano answers at length and in one go: a mere story would be made of several answers."""
    return f"Tell me what has happened so far. Begin with scene {scene}."


def ask(
    question_client: QuestionClient,
    shared: SharedTensors,
    question: str = QUESTION,
    most: int = 40,
    heard: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Ask, and return the whole answer; raises ``RuntimeError`` if there is none.

    ``heard`` is called once: at the first word, or at the end if there is none.
    """
    events = question_client.ask(shared.path, question, (), most)
    event = next(events)
    heard()
    while event.kind == "text":
        event = next(events)
    if event.kind == "error":
        raise RuntimeError(event.value)
    return dict(event.value)


def bench_live(seconds: float, model: str) -> dict[str, Any]:
    """One stream with questions, eight streams, answering while watching, twenty questions at once."""
    with workers(model) as (live, question_client):
        return {
            "one_stream": _one_stream(live, question_client, seconds),
            "eight_streams": _eight_streams(live, min(seconds, 60.0)),
            **_beside(live, question_client),
        }


def _one_stream(live: LiveStreams, question_client: QuestionClient, seconds: float) -> dict[str, Any]:
    """Two frames a second and a question every five seconds."""
    live.add("one", clip(0, 2.0))
    shared = shown_state(live, "one")
    ask(question_client, shared)
    time.sleep(SETTLE_SECONDS)
    lags: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            lags.append(live.status("one").lag or 0.0)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    before = live.status("one")
    started = time.monotonic()
    answers = []
    for i in track(range(int(seconds / 5)), "asking every 5 s", console=Console(stderr=True)):
        time.sleep(max(0.0, started + 5 * i - time.monotonic()))
        answers.append(ask(question_client, shared))
    stop.set()
    sampler.join()
    after = live.status("one")
    live.remove("one")
    firsts = [answer["first_token_seconds"] for answer in answers]
    warm = [answer["first_token_seconds"] for answer in answers if answer["warm"]]
    fresh = [answer["first_token_seconds"] for answer in answers if not answer["warm"]]
    return {
        "seconds": round(time.monotonic() - started, 1),
        "questions": len(answers),
        "lag_p95_seconds": percentile(lags, 0.95),
        "first_token_p95_seconds": percentile(firsts, 0.95),
        "first_token_warm_median_seconds": statistics.median(warm) if warm else None,
        "first_token_fresh_median_seconds": statistics.median(fresh) if fresh else None,
        "warm_share": len(warm) / len(answers),
        "tokens_per_second_median": statistics.median(answer["tokens_per_second"] for answer in answers),
        "frames_skipped": after.skipped - before.skipped,
        "frames_kept": after.kept - before.kept,
    }


def _eight_streams(live: LiveStreams, seconds: float) -> dict[str, Any]:
    """Eight streams at one frame a second each."""
    names = [f"eight-{i}" for i in range(8)]
    for i, name in enumerate(names):
        live.add(name, clip(i, 1.0))
    for name in names:
        shown_state(live, name)
    time.sleep(SETTLE_SECONDS)
    before = {name: live.status(name) for name in names}
    lags: list[float] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        lags += [live.status(name).lag or 0.0 for name in names]
    after = {name: live.status(name) for name in names}
    for name in names:
        live.remove(name)
    kept = [after[name].kept - before[name].kept for name in names]
    return {
        "seconds": seconds,
        "lag_p95_seconds": percentile(lags, 0.95),
        "frames_skipped": sum(after[name].skipped - before[name].skipped for name in names),
        "slowest_frames_per_second": min(kept) / seconds,
    }


def _beside(live: LiveStreams, question_client: QuestionClient) -> dict[str, Any]:
    """Time a question with no stream being watched and with one, and 20 questions one by one and concurrently."""
    live.add("still", Source(str(fetch([STREET])[0]), 2.0, pace="fast"))
    shared = shown_state(live, "still")
    while live.status("still").state != "ended":
        time.sleep(0.05)
    _timed(lambda: ask(question_client, shared, long_question()))
    alone = statistics.median(_timed(lambda: ask(question_client, shared, long_question())) for _ in range(10))
    live.add("beside", clip(1, 2.0))
    shown_state(live, "beside")
    watching = statistics.median(_timed(lambda: ask(question_client, shared, long_question())) for _ in range(10))
    live.remove("beside")
    questions = [f"{QUESTION} ({i})" for i in range(20)]
    singles = sum(_timed(lambda q=q: ask(question_client, shared, q)) for q in questions)  # type: ignore[misc]
    threads = [threading.Thread(target=ask, args=(question_client, shared, q)) for q in questions]

    def all_at_once() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together = _timed(all_at_once)
    live.remove("still")
    return {
        "answer_alone_seconds": alone,
        "answer_while_watching_seconds": watching,
        "while_watching_over_alone": watching / alone,
        "twenty_at_once_over_sum_of_singles": together / singles,
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def percentile(values: list[float], part: float) -> float:
    """The value that a ``part`` of ``values`` stays below."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def bench_soak(frames: int, model: str) -> dict[str, Any]:
    """Watch ``frames`` at full speed while asking questions; measures each process's memory and the time per frame.

    Memory is sampled with every question after a warm-up of a tenth of the frames (at most 5,000). Growth compares
    the medians of the first and last tenth of the samples, since a reader's memory varies by 2%.
    """
    with workers(model) as (live, question_client):
        live.add("soak", clip(1, 30.0, "fast"))
        shared = shown_state(live, "soak")
        warm = min(5000, frames // 10)
        sizes: list[dict[str, int]] = []
        rates: list[float] = []
        writes: list[float] = []
        questions, mark, marked = 0, time.monotonic(), 0
        with Console(stderr=True).status("soaking") as status:
            while (done := live.status("soak")).kept < frames:
                ask(question_client, shared, most=12)
                time.sleep(SOAK_PAUSE_SECONDS)
                questions += 1
                writes.append(done.write_seconds or 0.0)
                if done.kept >= warm:
                    sizes.append(_resident(live, question_client))
                if time.monotonic() - mark > 10:
                    rates.append((done.kept - marked) / (time.monotonic() - mark))
                    mark, marked = time.monotonic(), done.kept
                    status.update(f"{done.kept:,} of {frames:,} frames, {rates[-1]:.0f} a second")
        sizes.append(_resident(live, question_client))
        early, late = map(_medians, _tenths(sizes))
        write_early, write_late = map(statistics.median, _tenths(writes))
        return {
            "frames": frames,
            "questions": questions,
            "frames_per_second": statistics.median(rates) if rates else None,
            "resident_bytes": late,
            "resident_growth": {name: late[name] / size - 1 for name, size in early.items()},
            "write_seconds_early": write_early,
            "write_seconds_late": write_late,
            "lag_seconds": live.status("soak").lag,
        }


def _tenths(values: list[Any]) -> tuple[list[Any], list[Any]]:
    """The first and last tenth of ``values``."""
    tenth = max(1, len(values) // 10)
    return values[:tenth], values[-tenth:]


def _medians(sizes: list[dict[str, int]]) -> dict[str, int]:
    """The median size of each process, over the samples that include it."""
    return {name: int(statistics.median(size[name] for size in sizes if name in size)) for name in sizes[0]}


def _resident(live: LiveStreams, question_client: QuestionClient) -> dict[str, int]:
    """Resident bytes of each process, without shared memory."""
    frame = psutil.Process(live.worker.pid)
    sizes = {"frame worker": _own(frame), "question worker": _own(psutil.Process(question_client.worker.pid))}
    for child in frame.children():
        if "spawn_main" in " ".join(child.cmdline()):
            sizes["reader"] = _own(child)
    return sizes | {"asking side": _own(psutil.Process())}


def _own(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
