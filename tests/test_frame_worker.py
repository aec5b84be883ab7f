"""The frame worker: whatever happens to one stream, the others continue."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from flash_vstream.live import frame_worker
from flash_vstream.live.frame_worker import FrameWorker, state_layout
from flash_vstream.live.messages import Add, Remove
from flash_vstream.live.published import read_memory_table, read_picture, save_state
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import load_state
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import Frame
from flash_vstream.video.capture import FrameRing
from flash_vstream.video.sources import PUSH, Source
from helpers.videos import write_video
from helpers.waiting import until

SIDE = 224
BAD = 13
"""The grey level of a frame that fails to encode."""


class Worker:
    """A frame worker in the test process, with streams whose frames the test pushes."""

    def __init__(self, pipeline: FlashVStream, folder: Path):
        self.folder = folder
        self.layout = state_layout(pipeline.new_stream().memory)
        self.rings: dict[str, FrameRing] = {}
        self.pushed_at = 0.0
        self.orders, theirs = multiprocessing.Pipe()
        self.worker = FrameWorker(pipeline, theirs)

    def add(self, name: str, source: str = PUSH, saved: Path | None = None, **more: object) -> SharedTensors:
        own = self.folder / name
        path = str(own / "state")
        if not own.exists():
            own.mkdir()
            SharedTensors.create(path, self.layout)
        ring = str(own / "pushed") if source == PUSH else None
        if ring:
            self.rings[name] = FrameRing(ring, SIDE, create=not os.path.exists(ring))
        order = Add(
            name, Source(source, **{"size": SIDE, "fps": 120, **more}), path, str(saved) if saved else None, ring
        )
        self.orders.send(order)
        return SharedTensors(path)

    def push(self, *names: str, grey: int = 100) -> None:
        self.pushed_at = max(self.pushed_at + 0.1, time.monotonic())  # slower than a stream's rate, so none is skipped
        for name in names:
            ring = self.rings[name]
            number = max(ring.taken, int(ring._slots["sequence"].max())) + 1
            ring.write(number, Frame(self.pushed_at, np.full((SIDE, SIDE, 3), grey, np.uint8)))

    def until(self, condition):
        return until(lambda: self.worker.step() and condition())

    def kept(self, name: str) -> int:
        return (SharedTensors(str(self.folder / name / "state")).read_status() or {}).get("kept", 0)

    def end(self) -> None:
        self.orders.close()
        self.worker.run()


@pytest.fixture
def pipeline(tiny):
    """The tiny model, failing on frames of one particular grey level."""
    pipeline = FlashVStream(*tiny)
    encode = pipeline.encode

    def fragile(frames):
        if any(frame[0, 0, 0] == BAD for frame in frames):
            raise RuntimeError("this frame cannot be encoded")
        return encode(frames)

    pipeline.encode = fragile
    return pipeline


@pytest.fixture
def worker(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_worker, "RETRY_SECONDS", (0.05, 60.0))
    running = Worker(pipeline, tmp_path)
    yield running
    running.end()


def test_of_a_batch_the_frame_at_fault_fails_alone(worker):
    bad, good = worker.add("bad"), worker.add("good")
    worker.push("bad", "good")
    worker.until(lambda: worker.kept("bad") == worker.kept("good") == 1)
    worker.push("bad", grey=BAD)
    worker.push("good")
    worker.until(lambda: bad.read_status()["state"] == "failed")
    assert "this frame cannot be encoded" in bad.read_status()["error"]
    assert worker.kept("good") == 2
    assert good.read_status()["state"] == "live"


def test_a_failed_stream_is_begun_again_with_its_memory_after_waits_that_grow(worker):
    shared = worker.add("bad")
    worker.push("bad")
    worker.until(lambda: worker.kept("bad") == 1)
    waits = []
    for count in (1, 2, 3):
        worker.push("bad", grey=BAD)
        worker.until(lambda count=count: (failure := worker.worker.failures.get("bad")) and failure.count == count)
        waits.append(worker.worker.failures["bad"].retry_at - time.monotonic())
        assert shared.read_status()["state"] == "failed"
        worker.until(lambda: "bad" in worker.worker.watched)
        assert shared.read_status()["state"] == "failed"  # keeps its error until a frame is stored
        assert "cannot be encoded" in shared.read_status()["error"]
    assert waits[2] > waits[0]
    worker.push("bad")
    worker.until(lambda: worker.kept("bad") == 2)
    assert (shared.read_status()["state"], shared.read_status()["error"]) == ("live", None)
    assert shared.read_status()["restarts"] == 3
    assert int(shared.read(("memory.frames",))[0]["memory.frames"]) == 2


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), EOFError(), MemoryError(), BaseException("panic")]
)
def test_whatever_a_reader_raises_is_its_streams_affair(worker, error):
    worker.add("bad"), worker.add("good")
    worker.push("bad", "good")
    worker.until(lambda: worker.kept("bad") == worker.kept("good") == 1)

    def broken() -> None:
        raise error

    worker.worker.watched["bad"].reader.newest = broken
    worker.worker.watched["bad"].reader.close = broken if isinstance(error, OSError) else lambda: None
    worker.push("good")
    worker.until(lambda: "bad" in worker.worker.failures and worker.kept("good") == 2)
    worker.push("bad")
    worker.until(lambda: worker.kept("bad") == 2)  # it was restarted


def test_a_shared_state_that_has_gone_is_its_streams_affair(worker):
    worker.add("bad"), worker.add("good")
    worker.until(lambda: "good" in worker.worker.watched)
    (worker.folder / "bad" / "state").unlink()
    worker.worker._fail("bad", OSError("gone"))
    worker.until(lambda: worker.worker.failures["bad"].count >= 2)
    worker.push("good")
    worker.until(lambda: worker.kept("good") == 1)
    worker.orders.send(Remove("bad"))
    worker.until(worker.orders.poll)
    assert worker.orders.recv() == str(worker.folder / "bad" / "state")
    assert not worker.worker.failures


def test_errors_of_any_length_are_told_and_the_others_go_on(worker):
    deep = worker.folder.joinpath(*["Ж" * 124] * 6)
    deep.parent.mkdir(parents=True)
    deep.write_text("no video" * 100)
    sources = ["http://127.0.0.1:1/" + "é" * 900, "http://127.0.0.1:1/" + '"' * 1975, str(deep)]
    streams = [worker.add(f"bad-{i}", source) for i, source in enumerate(sources)]
    worker.add("good")

    def failed() -> bool:
        worker.push("good")
        return all((shared.read_status() or {}).get("error") for shared in streams)

    worker.until(failed)
    assert [shared.read_status()["state"] for shared in streams] == ["reconnecting", "reconnecting", "failed"]
    kept = worker.kept("good")
    worker.push("good")
    worker.until(lambda: worker.kept("good") > kept > 0)


def again(worker: Worker, pipeline: FlashVStream) -> Worker:
    """A new frame worker on the same shared states, as after a kill -9."""
    return Worker(pipeline, worker.folder)


def test_an_ended_file_stays_ended_when_its_file_is_gone_and_the_worker_was_killed(worker, pipeline):
    video = write_video(worker.folder / "clip.mp4", frames=4)
    shared = worker.add("once", str(video), fps=10, pace="fast")
    worker.until(lambda: (shared.read_status() or {}).get("state") == "ended")
    kept = worker.kept("once")
    video.unlink()
    later = again(worker, pipeline)
    # The source in the order was created while the file existed.
    later.orders.send(worker.worker.added["once"])
    later.add("good")
    later.until(lambda: "good" in later.worker.watched)
    later.push("good")
    later.until(lambda: later.kept("good") == 1)
    assert (shared.read_status()["state"], later.kept("once")) == ("ended", kept)
    later.end()


def test_what_was_saved_of_an_ended_file_is_there_after_a_restart(worker, pipeline):
    """No frame will ever come again, so the memory has to be published without one."""
    video = write_video(worker.folder / "clip.mp4", frames=4)
    shared = worker.add("once", str(video), fps=10, pace="fast")
    worker.until(lambda: (shared.read_status() or {}).get("state") == "ended")
    save_state(shared, worker.folder / "saved.safetensors")
    (worker.folder / "later").mkdir()
    later = Worker(pipeline, worker.folder / "later")
    again = later.add("once", str(video), saved=worker.folder / "saved.safetensors", fps=10, pace="fast")
    later.until(lambda: (again.read_status() or {}).get("state") == "ended")
    table, picture = read_memory_table(again), read_picture(again)
    assert (table.frames, table.time) == (worker.kept("once"), shared.read_status()["time"])
    assert picture == read_picture(shared)
    later.end()


def test_a_file_that_went_while_it_was_watched_is_told(worker, pipeline):
    video = write_video(worker.folder / "clip.mp4", frames=100)
    shared = worker.add("once", str(video), fps=2)
    worker.until(lambda: worker.kept("once") > 0)
    video.unlink()
    later = again(worker, pipeline)
    later.orders.send(worker.worker.added["once"])
    later.add("good")
    later.until(lambda: shared.read_status()["state"] in ("failed", "reconnecting"))
    assert shared.read_status()["error"]
    later.push("good")
    later.until(lambda: later.kept("good") == 1)
    later.end()


def test_nothing_but_the_state_lies_in_a_streams_folder(worker):
    """So a killed worker leaves nothing else behind; the ring has no file name."""
    video = write_video(worker.folder / "clip.mp4", frames=20)
    worker.add("door", str(video), fps=10, loop=True)
    worker.until(lambda: worker.kept("door") > 0)
    assert os.listdir(worker.folder / "door") == ["state"]


# --- clocks


def test_a_clock_that_is_set_breaks_nothing(worker, monkeypatch):
    """The wall clock jumps an hour either way while frames are pushed: times continue and the lag is right."""
    shared = worker.add("door")
    real = time.time
    for count, hours in enumerate((0, 1, -1, 0), 1):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        worker.push("door")
        worker.until(lambda count=count: worker.kept("door") == count)
        status = shared.read_status()
        assert 0 <= status["time"] < 60
        assert time.monotonic() - status["monotonic"] < 60


@pytest.mark.parametrize(("hours", "gap"), [(1, 0), (-1, 3600)])
def test_a_saved_clock_that_lies_elsewhere_breaks_nothing(worker, pipeline, monkeypatch, hours, gap):
    shared = worker.add("door")
    with monkeypatch.context() as patch:
        real = time.time
        patch.setattr(time, "time", lambda: real() + 3600 * hours)
        worker.push("door")
        worker.until(lambda: worker.kept("door") == 1)
        save_state(shared, worker.folder / "saved.safetensors")
    (worker.folder / "later").mkdir()
    later = Worker(pipeline, worker.folder / "later")
    again = later.add("door", saved=worker.folder / "saved.safetensors")
    later.until(lambda: "door" in later.worker.watched)
    later.push("door")
    later.until(lambda: later.kept("door") == 2)
    assert gap <= again.read_status()["time"] < gap + 60
    assert again.read_status()["gaps"] == [[0.0, pytest.approx(gap, abs=60)]]
    later.end()


# --- saved memories


@pytest.mark.parametrize("at", [0.2, 0.9])
def test_a_flipped_bit_in_a_saved_memory_is_noticed_and_the_file_set_aside(worker, pipeline, tmp_path, at):
    shared = worker.add("door")
    worker.push("door")
    worker.until(lambda: worker.kept("door") == 1)
    saved = tmp_path / "saved.safetensors"
    save_state(shared, saved)
    data = bytearray(saved.read_bytes())
    (tmp_path / "saved.set-aside").write_text("an older one")
    data[int(len(data) * at)] ^= 4
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_state(saved)
    (tmp_path / "later").mkdir()
    later = Worker(pipeline, tmp_path / "later")
    again = later.add("door", saved=saved)
    later.until(lambda: (again.read_status() or {}).get("state") == "failed")
    assert "saved.set-aside-2" in again.read_status()["error"]
    assert (tmp_path / "saved.set-aside-2").read_bytes() == data
    assert (tmp_path / "saved.set-aside").read_text() == "an older one"
    later.until(lambda: "door" in later.worker.watched)
    later.push("door")
    later.until(lambda: later.kept("door") == 1)
    assert again.read_status()["error"] is None
    later.end()


def test_a_saved_memory_that_cannot_be_read_now_is_not_written_over(worker, tmp_path):
    """A disk error does not mean the file is damaged: the stream waits for its memory."""
    saved = tmp_path / "saved.safetensors"
    saved.mkdir()  # reading it is an OSError
    shared = worker.add("door", saved=saved)
    worker.until(lambda: "door" in worker.worker.failures and worker.worker.failures["door"].count >= 2)
    assert shared.read_status()["state"] == "failed"
    assert shared.read() is None
    assert saved.exists()


def test_the_worker_ends_when_nobody_gives_orders(pipeline, tmp_path):
    worker = Worker(pipeline, tmp_path)
    worker.add("door")
    worker.until(lambda: "door" in worker.worker.watched)
    worker.end()
    assert worker.worker.watched == {}
