"""Many at once, through the workers of a live server: questions that come together, and streams beside one another."""

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from flash_vstream.bench.live import SETTLE_SECONDS, ask, clip, long_question, percentile, shown_state
from flash_vstream.errors import UserError
from flash_vstream.live.question_client import QuestionClient
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.streams import LiveStreams
from flash_vstream.video.sources import Source

TOGETHER, MOST_TOGETHER = 20, 64
TOKENS = 40
ROUNDS = 3
STREAM_COUNTS = (8, 12, 16, 24, 32, 48, 64, 96, 128)
LAG_SECONDS = 1.0


def measure_questions(live: LiveStreams, client: QuestionClient) -> dict[str, float]:
    """Twenty questions at once beside one after another, one that comes later, sixty-four, and one after a frame.

    ``together`` is the time of twenty as a share of the sum of their single times; ``late_first_token_seconds`` is
    that of a question asked when twenty others have their first words; ``answered`` is how many of sixty-four were
    answered, and ``unfair`` the slowest one's time to its end as a multiple of the median;
    ``fresh_first_token_seconds`` is that of a question asked as soon as a new frame is in the memory. Times are
    medians.
    """
    live.add("still", Source(clip(0, 2.0).name, 2.0, pace="fast"))
    shared = shown_state(live, "still")
    while live.status("still").state != "ended":
        time.sleep(0.05)
    ask(client, shared, long_question(), TOKENS)
    ratios = [_together(client, shared) for _ in range(ROUNDS)]
    late = [_late_comer(client, shared) for _ in range(ROUNDS)]
    answers = _at_once(client, shared, MOST_TOGETHER)
    ends = [seconds for seconds, reason in answers if reason is None]
    for reason in {reason for _, reason in answers if reason is not None}:
        Console(stderr=True).print(f"not answered: {reason}", style="red", markup=False)
    live.remove("still")
    return {
        "together": statistics.median(ratios),
        "late_first_token_seconds": statistics.median(late),
        "answered": len(ends),
        "unfair": max(ends) / statistics.median(ends) if ends else math.inf,
        "fresh_first_token_seconds": _after_a_frame(live, client),
    }


def _together(client: QuestionClient, shared: SharedTensors) -> float:
    started = time.monotonic()
    for number in range(TOGETHER):
        ask(client, shared, long_question(number), TOKENS)
    alone = time.monotonic() - started
    ends = _at_once(client, shared, TOGETHER)
    for _, reason in ends:
        if reason is not None:
            raise RuntimeError(reason)
    return max(seconds for seconds, _ in ends) / alone


def _late_comer(client: QuestionClient, shared: SharedTensors) -> float:
    begun = threading.Semaphore(0)
    crowd = threading.Thread(target=_at_once, args=(client, shared, TOGETHER, begun.release))
    crowd.start()
    for _ in range(TOGETHER):
        begun.acquire()
    answer = ask(client, shared, "What do you see?", TOKENS)
    crowd.join()
    return float(answer["first_token_seconds"])


def _at_once(
    client: QuestionClient, shared: SharedTensors, count: int, heard: Callable[[], object] = lambda: None
) -> list[tuple[float, str | None]]:
    """Ask so many questions at once: each one's seconds to its end, and why it was not answered, None if it was.

    ``heard`` is called for each as in ``ask``.
    """
    found: list[tuple[float, str | None]] = []

    def one(number: int) -> None:
        reason = None
        try:
            ask(client, shared, long_question(number), TOKENS, heard)
        except RuntimeError as error:
            reason = str(error)
        found.append((time.monotonic() - started, reason))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _after_a_frame(live: LiveStreams, client: QuestionClient, count: int = 8) -> float:
    """The median first token of questions that are asked when a new frame of a stream is in the memory."""
    live.add("moving", clip(1, 1.0))
    shared = shown_state(live, "moving")
    ask(client, shared, long_question(), 1)  # from now on the memory is read ahead
    firsts = []
    for _ in range(count):
        before = live.status("moving").kept
        while live.status("moving").kept == before:
            time.sleep(0.002)
        firsts.append(float(ask(client, shared, long_question(), 1)["first_token_seconds"]))
    live.remove("moving")
    return statistics.median(firsts)


def measure_streams(
    live: LiveStreams, client: QuestionClient, seconds: float, counts: Sequence[int] = STREAM_COUNTS
) -> dict[str, Any]:
    """How many streams of looped clips at one frame a second keep up while a question is asked every second.

    They keep up if 95% of all frames are in the memory at most a second later than the soonest of their stream, and
    as many come at all. Streams are added up to each of ``counts``, until they do not keep up.
    """
    steps: list[dict[str, float]] = []
    most = added = 0
    with Console(stderr=True).status("") as status:
        for count in counts:
            status.update(f"{count} streams")
            try:
                for number in range(added, count):
                    live.add(f"crowd-{number}", clip(number, 1.0))
            except UserError:  # no room for more
                break
            added = count
            steps.append(_watched(live, client, count, seconds))
            if steps[-1]["lag_p95_seconds"] > LAG_SECONDS or steps[-1]["frames_share"] < 0.95:
                break
            most = count
    for name in live.names():
        live.remove(name)
    return {"most": most, "steps": steps}


def _watched(live: LiveStreams, client: QuestionClient, count: int, seconds: float) -> dict[str, float]:
    """Watch for so long, with a question about another stream every second; ``lag`` as in ``measure_streams``."""
    names = [f"crowd-{number}" for number in range(count)]
    states = [shown_state(live, name) for name in names]
    time.sleep(SETTLE_SECONDS)
    firsts: list[float] = []
    asking = [
        threading.Timer(second, _note_first, (client, states[second % count], firsts)) for second in range(int(seconds))
    ]
    for timer in asking:
        timer.start()
    entered: dict[str, dict[float, float]] = {name: {} for name in names}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        for name in names:
            status = live.status(name)
            if status.time is not None and status.lag is not None:
                entered[name].setdefault(status.time, time.monotonic() - status.lag - status.time)
    for timer in asking:
        timer.join()
    delays = [delay - min(own.values()) for own in entered.values() for delay in own.values()]
    return {
        "streams": count,
        "lag_p95_seconds": percentile(delays, 0.95),
        "frames_share": len(delays) / (count * seconds),
        "first_token_p95_seconds": percentile(firsts, 0.95) if firsts else float("nan"),
    }


def _note_first(client: QuestionClient, shared: SharedTensors, firsts: list[float]) -> None:
    firsts.append(float(ask(client, shared, long_question(), TOKENS)["first_token_seconds"]))
