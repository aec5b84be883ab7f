"""The question worker: whatever happens to one question, the others are answered."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.messages import Ask, Cancel, Report, Watch
from flash_vstream.live.question_client import HUNG, QuestionClient
from flash_vstream.live.question_worker import QuestionWorker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import Pictures, empty_slots, stream_state
from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.pipeline import FlashVStream
from helpers.waiting import until


class Worker:
    """A question worker in the test process."""

    def __init__(self, pipeline: FlashVStream):
        self.pipeline = pipeline
        self.ours, theirs = multiprocessing.Pipe()
        self.worker = QuestionWorker(pipeline, theirs)

    def share(self, path: Path) -> SharedTensors:
        """Create the shared state of a stream that has shown one frame."""
        memory = self.pipeline.new_stream().memory
        shared = SharedTensors.create(str(path), state_layout(memory))
        config = self.pipeline.model.config
        memory.write(torch.randn(1, config.pooled_size**2, config.vision_config.hidden_size), [0.0])
        state = stream_state(memory, empty_slots(memory), Pictures.of(memory))
        shared.publish(state, {"monotonic": time.monotonic() - 9})
        return shared

    def ends(self) -> dict[int, tuple[str, object]]:
        """How each question ended, once all have ended."""
        while self.worker.step() or self.worker.waiting:
            pass
        found = {}
        while self.ours.poll():
            number, kind, value = self.ours.recv()
            found[number] = (kind, value)
        return found


@pytest.fixture
def worker(tiny):
    return Worker(FlashVStream(*tiny))


class Panic(BaseException):
    """What tokenizers raises when it panics; not an ``Exception``."""


@pytest.mark.parametrize("error", [TypeError("bad text"), RuntimeError("out of memory"), MemoryError(), Panic("panic")])
def test_what_one_question_raises_ends_that_one(worker, error):
    tokenize = worker.pipeline.processor.question_ids

    def fragile(question, history=()):
        if question == "bad":
            raise error
        return tokenize(question, history)

    worker.pipeline.processor.question_ids = fragile
    try:
        for number, question in enumerate(("good", "bad", "fine")):
            worker.worker.take(Ask(number, None, question, max_new_tokens=3))
        ends = worker.ends()
    finally:
        del worker.pipeline.processor.question_ids
    assert [ends[number][0] for number in range(3)] == ["done", "error", "done"]
    assert type(error).__name__ in ends[1][1]


def test_a_lone_surrogate_ends_its_question_alone(worker):
    worker.worker.take(Ask(0, None, "\ud800", max_new_tokens=3))
    worker.worker.take(Ask(1, None, "hello", (("\ud800", "\udfff"),), max_new_tokens=3))
    worker.worker.take(Ask(2, None, "hello", max_new_tokens=3))
    ends = worker.ends()
    assert set(ends) == {0, 1, 2}
    assert ends[2][0] == "done"


def test_errors_that_callers_provoke_do_not_fill_the_log(worker, caplog, monkeypatch):
    def broken(*_: object) -> list[int]:
        raise RuntimeError("a bug that callers can reach")

    monkeypatch.setattr(worker.pipeline.processor, "question_ids", broken)
    for number in range(20):
        worker.worker.take(Ask(number, None, "hello", max_new_tokens=3))
    assert {kind for kind, _ in worker.ends().values()} == {"error"}
    assert len(caplog.records) == 1


def test_a_question_has_so_many_seconds(worker):
    worker.worker.take(Ask(0, None, "hello", max_new_tokens=1000, seconds=0.01))
    worker.worker.take(Ask(1, None, "hello", max_new_tokens=3))
    worker.worker.take(Ask(2, None, "asked long ago", asked_at=time.monotonic() - 200))
    ends = worker.ends()
    assert ends[0][0] == "error"
    assert "longer than the 0.01 s" in ends[0][1]
    assert ends[1][0] == "done"
    assert "120 s" in ends[2][1]


def test_a_question_that_nobody_waits_for_is_dropped(worker):
    worker.worker.take(Ask(0, None, "hello", max_new_tokens=1000))
    worker.worker.take(Ask(1, None, "hello", max_new_tokens=2))
    worker.worker.step()
    worker.worker.take(Cancel(0))
    ends = worker.ends()
    assert 0 not in ends or ends[0][0] == "text"  # it may have begun, and does not end
    assert ends[1][0] == "done"


def test_questions_that_wait_have_no_more_time(worker, monkeypatch):
    monkeypatch.setattr("flash_vstream.live.question_worker.AT_ONCE", 1)
    worker.worker.take(Ask(0, None, "hello", max_new_tokens=200))
    worker.worker.take(Ask(1, None, "hello", seconds=0.0))
    worker.worker.step()
    assert worker.ours.recv()[:2] == (1, "error")
    assert not worker.worker.waiting


def sizes_of_steps(worker, monkeypatch) -> list[int]:
    """A list that grows by the number of sequences in every step of the worker's engine, which takes many at once."""
    engine, sizes = worker.worker.generator.engine, []
    step = engine.step
    monkeypatch.setattr(engine, "together", True)
    monkeypatch.setattr(engine, "step", lambda feeds: sizes.append(len(feeds)) or step(feeds))
    return sizes


def test_questions_are_generated_together_and_a_late_one_joins(worker, monkeypatch):
    sizes = sizes_of_steps(worker, monkeypatch)
    for number in range(2):
        worker.worker.take(Ask(number, None, f"hello {number}", max_new_tokens=6))
    worker.worker.step()
    assert sizes[-1] == 2
    worker.worker.take(Ask(2, None, "late", max_new_tokens=2))
    worker.worker.step()
    assert sizes[-1] == 3
    assert {kind for kind, _ in worker.ends().values()} == {"done"}


def test_a_step_reads_few_questions_so_that_the_first_ones_need_not_wait_for_all(worker, monkeypatch):
    question = worker.pipeline.processor.question_ids("hello")
    monkeypatch.setattr("flash_vstream.live.question_worker.STEP_TOKENS", 2 * len(question))
    for number in range(5):
        worker.worker.take(Ask(number, None, "hello", max_new_tokens=9))
    begun = []
    while worker.worker.waiting:
        worker.worker.step()
        begun.append(len(worker.worker.active))
    assert begun == [2, 4, 5]
    assert {kind for kind, _ in worker.ends().values()} == {"done"}


def test_any_number_of_questions_at_once_is_answered(worker, monkeypatch):
    monkeypatch.setattr("flash_vstream.live.question_worker.STEP_TOKENS", 10_000)
    sizes = sizes_of_steps(worker, monkeypatch)
    for number in range(70):
        worker.worker.take(Ask(number, None, f"hello {number}", max_new_tokens=2))
    ends = worker.ends()
    assert [ends[number][0] for number in range(70)] == ["done"] * 70
    assert max(sizes) == 64


def test_a_memory_is_read_between_two_steps_of_the_others(worker, monkeypatch, tmp_path):
    paths = [worker.share(tmp_path / name).path for name in ("one", "two", "three")]
    worker.worker.take(Ask(0, None, "hello", max_new_tokens=9))
    worker.worker.step()
    read, counts = worker.worker._read, []
    monkeypatch.setattr(worker.worker, "_read", lambda shared: counts.append(shared.path) or read(shared))
    for number, path in enumerate(paths, 1):
        worker.worker.take(Ask(number, path, "hello", max_new_tokens=9))
    for number in range(1, 4):
        worker.worker.step()
        assert counts == paths[:number]
    assert {kind for kind, _ in worker.ends().values()} == {"done"}


def test_the_memory_of_a_removed_stream_is_let_go_of(worker, tmp_path):
    path = tmp_path / "state"
    worker.share(path)
    worker.worker.take(Ask(0, str(path), "hello", max_new_tokens=5))
    worker.worker.step()
    assert str(path) in Path("/proc/self/maps").read_text()
    path.unlink()
    worker.worker.drop_removed()
    assert worker.worker.prefixes == {}
    assert worker.ends()[0][0] == "done"  # earlier questions are still answered
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_memory_that_cannot_be_read_ahead_is_left_alone(worker, tmp_path):
    shared = worker.share(tmp_path / "state")
    worker.worker.take(Ask(0, shared.path, "hello", max_new_tokens=1))
    assert worker.ends()[0][0] == "done"
    worker.worker.prefixes.clear()

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    worker.worker._read = broken
    assert worker.worker.read_ahead() is False
    assert worker.worker.shared_states == {}


# --- a separate process


def test_whoever_takes_a_report_may_wait_for_the_worker(tiny_folder):
    client, taken = QuestionClient(str(tiny_folder)), threading.Event()

    def take(report: Report) -> None:
        taken.wait(60)

    client.on_report = take
    try:
        client._watches["door"] = Watch("door", "nowhere", "a dog", WatchRule(), {})
        client._take(Report("door", {"phase": "away"}))
        assert list(client.ask(None, "hello", (), 1))[-1].kind == "done"
    finally:
        taken.set()
        client.close()
    assert not client._reporter.is_alive()


def test_a_hung_worker_is_started_again(tiny_folder):
    client = QuestionClient(str(tiny_folder), question_seconds=1.0, hang_seconds=1.0)
    try:
        hung = psutil.Process(client.worker.pid)
        hung.suspend()
        assert list(client.ask(None, "hello")) == [HUNG]
        until(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)
        until(lambda: client.worker.restarts == 1 and client.worker.alive)
        until(lambda: list(client.ask(None, "hello", (), 1))[-1].kind == "done")
    finally:
        client.close()
        client.close()


def test_a_worker_that_is_closed_while_it_starts_again_stays_closed(tiny_folder):
    client = QuestionClient(str(tiny_folder))
    before = client.worker.pid
    os.kill(before, signal.SIGKILL)
    until(lambda: client.worker.pid != before)
    client.close()
    assert not client.worker.alive
    assert not client.worker._guard.is_alive()
