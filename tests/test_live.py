"""Live sources, the frame worker and what survives a kill -9: real processes, the tiny model."""

import fcntl
import multiprocessing
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.live.question_worker import Ask, QuestionWorker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import Pictures, empty_slots, max_slots, stream_state
from flash_vstream.live.streams import LiveStreams
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import Frame
from flash_vstream.video.capture import FrameRing, SourceReader
from flash_vstream.video.sources import Source, hide_secrets, watch_source
from helpers.memory import small_memory
from helpers.videos import write_video
from helpers.waiting import until

# --- sources


def test_a_file_plays_at_its_own_pace_and_loops(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=10)
    begun = time.monotonic()
    frames = watch_source(Source(str(video), fps=5, size=16, loop=True))
    times = [next(frames).time for _ in range(8)]
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4], abs=0.02)
    assert 1.3 < time.monotonic() - begun < 3
    fast = list(watch_source(Source(str(video), fps=5, size=16, pace="fast")))
    assert len(fast) == 5


def test_a_folder_of_pictures_is_a_stream(tmp_path):
    for i, name in enumerate(["b.png", "a.png", "c.jpg"]):
        Image.new("RGB", (40, 20), (60 * i, 0, 0)).save(tmp_path / name)
    frames = list(watch_source(Source(str(tmp_path), fps=2, size=16, pace="fast")))
    assert [frame.time for frame in frames] == [0, 0.5, 1.0]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == pytest.approx([60, 0, 120], abs=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        list(watch_source(Source(str(tmp_path / "empty"))))


def test_a_pipe_is_a_stream(tmp_path):
    video = write_video(tmp_path / "clip.mkv", frames=10, codec="ffv1")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(video.read_bytes()), daemon=True).start()
    frames = list(watch_source(Source(str(pipe), fps=100, size=16)))
    assert 1 <= len(frames) <= 10
    assert frames[0].time == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "/none/such.mp4"}, "nothing to watch"),
        ({"fps": 0}, "frame rate"),
        ({"pace": "slow"}, "pace"),
        ({"transport": "sctp"}, "transport"),
    ],
)
def test_bad_sources_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Source(**{"name": "rtsp://host/1", **settings})


def test_secrets_are_never_shown():
    assert hide_secrets("rtsp://admin:pass@cam:554/1?token=x") == "rtsp://cam:554/1?…"
    assert hide_secrets("/a/file@home.mp4") == "/a/file@home.mp4"
    assert "pass" not in Source("rtsp://admin:pass@cam/1").shown


# --- the reader's process


def test_the_ring_gives_the_newest_frame_whole(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    other = FrameRing(str(tmp_path / "ring"), 4)
    assert other.newest(0) is None
    for number in range(1, 8):
        ring.write(number, Frame(number / 2, np.full((4, 4, 3), number, np.uint8)))
    number, frame = other.newest(3)
    assert (number, frame.time, frame.image.min(), frame.image.max()) == (7, 3.5, 7, 7)
    assert other.newest(7) is None


def read_to_the_end(reader: SourceReader) -> list[Frame]:
    frames = []

    def step():
        if (frame := reader.newest()) is not None:
            frames.append(frame)
        return reader.status.state in ("ended", "failed")

    until(step)
    reader.close()
    return frames


def test_a_fast_file_is_read_without_a_gap(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=30)
    reader = SourceReader(Source(str(video), fps=10, size=16, pace="fast"), str(tmp_path))
    frames = read_to_the_end(reader)
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(30)], abs=0.01)
    assert (reader.status.came, reader.status.skipped, reader.status.state) == (30, 0, "ended")


def test_a_slow_taker_gets_the_newest_and_the_rest_is_counted(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=30)
    reader = SourceReader(Source(str(video), fps=10, size=16), str(tmp_path))
    first = until(reader.newest)
    time.sleep(1.0)
    second = until(reader.newest)
    assert second.time - first.time > 0.5
    assert reader.status.skipped >= 4
    assert reader.status.came == reader.status.skipped + 2
    reader.close()


def test_a_killed_reader_comes_back_and_time_goes_on(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    reader = SourceReader(Source(str(video), fps=10, size=16, loop=True), str(tmp_path))
    before = until(reader.newest)
    os.kill(reader._process.pid, signal.SIGKILL)
    gap = time.monotonic()
    until(lambda: reader.newest() is None and reader.status.state == "reconnecting")
    after = until(reader.newest)
    assert reader.status.restarts == 1
    assert after.time - before.time == pytest.approx(time.monotonic() - gap, abs=0.7)
    reader.close()


def test_a_source_that_sends_nothing_is_opened_again(tmp_path):
    pipe = tmp_path / "silent"
    os.mkfifo(pipe)
    reader = SourceReader(Source(str(pipe), size=16, loop=True), str(tmp_path), silence=0.5)
    until(lambda: reader.newest() is None and reader.status.restarts >= 1)
    assert "nothing came" in reader.status.error
    reader.close()


def test_a_live_source_that_ends_is_opened_again(tmp_path):
    """A pipe that is read as live, whose writer goes away and comes back."""
    video = write_video(tmp_path / "clip.mkv", frames=10, codec="ffv1").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        threading.Thread(target=pipe.write_bytes, args=(video,), daemon=True).start()

    reader = SourceReader(Source(str(pipe), fps=50, size=16, loop=True), str(tmp_path))
    write()
    first = until(reader.newest)
    until(lambda: (reader.newest(), reader.status.restarts)[1] == 1)
    assert "ended" in reader.status.error
    write()
    assert until(reader.newest).time > first.time
    reader.close()


def test_a_file_that_cannot_be_read_fails_for_good(tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    reader = SourceReader(Source(str(tmp_path / "text.mp4"), size=16), str(tmp_path))
    assert read_to_the_end(reader) == []
    assert reader.status.state == "failed"
    assert "not a video" in reader.status.error


# --- shared tensors


def test_shared_tensors_carry_a_memory_whole(tmp_path):
    memory = small_memory()
    shared = SharedTensors.create(str(tmp_path / "state"), memory.state_dict())
    assert shared.read() is None
    memory.write(torch.randn(9, 4, 8), torch.arange(9))
    shared.publish(memory.state_dict(), {"state": "live"})
    state, notes = SharedTensors(str(tmp_path / "state")).read()
    restored = small_memory()
    restored.load_state_dict(state)
    assert notes == {"state": "live"}
    assert torch.equal(restored.read().tokens(), memory.read().tokens())
    size = shared.nbytes
    for i in range(9, 200):
        memory.write(torch.randn(1, 4, 8), [float(i)])
        shared.publish(memory.state_dict(), {})
    assert shared.nbytes == size == os.path.getsize(shared.path)
    with pytest.raises(ValueError, match="notes"):
        shared.publish(memory.state_dict(), {"error": "x" * 5000})


def _hammer(path: str, seconds: float) -> None:
    shared = SharedTensors(path)
    deadline, i = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        i += 1
        shared.publish({"a": torch.full((50_000,), float(i)), "b": torch.full((50_000,), float(i))}, {"i": i})


def test_a_board_is_never_read_half_written(tmp_path):
    path = str(tmp_path / "state")
    shared = SharedTensors.create(path, {"a": torch.zeros(50_000), "b": torch.zeros(50_000)})
    writer = multiprocessing.get_context("spawn").Process(target=_hammer, args=(path, 1.5))
    writer.start()
    seen = set()
    while writer.is_alive():
        known = shared.read()
        if known is not None:
            state, notes = known
            assert state["a"].min() == state["a"].max() == state["b"].min() == state["b"].max() == notes["i"]
            seen.add(notes["i"])
    assert len(seen) > 20


# --- the frame worker


@pytest.fixture(scope="module")
def live(tiny_folder):
    with LiveStreams(str(tiny_folder)) as streams:
        yield streams


@pytest.fixture(scope="module")
def looped(tmp_path_factory) -> Source:
    video = write_video(tmp_path_factory.mktemp("looped") / "clip.mp4", frames=20)
    return Source(str(video), fps=10, size=224, loop=True)


def test_frames_are_watched_while_questions_are_asked(live, looped, tiny):
    live.add("door", looped)
    model = FlashVStream(*tiny)
    snapshot = until(lambda: live.snapshot("door", model))
    answer = model.ask(snapshot, "what?", max_new_tokens=8).finish()
    assert answer.stream_time == snapshot.time
    later = until(lambda: (now := live.snapshot("door", model)).frames > snapshot.frames + 3 and now)
    assert later.temporal.weight.sum() == later.frames
    status = live.status("door")
    assert status.state == "live"
    assert status.kept >= later.frames
    assert status.lag < 2
    live.remove("door")
    assert live.names() == []
    with pytest.raises(UserError, match="no stream is called 'door'"):
        live.status("door")


def test_a_killed_frame_worker_is_back_with_its_memory(live, looped, tiny):
    model = FlashVStream(*tiny)
    live.add("street", looped)
    before = until(
        lambda: (snapshot := live.snapshot("street", model)) is not None and snapshot.frames > 15 and snapshot
    )
    restarts = live.worker.restarts
    os.kill(live.worker.pid, signal.SIGKILL)
    until(lambda: live.worker.restarts > restarts)
    after = until(lambda: (snapshot := live.snapshot("street", model)).frames > before.frames + 5 and snapshot)
    assert after.temporal.weight.sum() == after.frames
    assert after.temporal.start.min() == before.temporal.start.min() == 0
    assert after.time > before.time
    live.remove("street")


def test_streams_have_names_of_their_own(live, looped):
    live.add("one", looped)
    with pytest.raises(UserError, match="already"):
        live.add("one", looped)
    live.add("two", looped)
    until(lambda: live.status("one").time is not None and live.status("two").time is not None)
    live.remove("one")
    live.remove("two")


# --- the command


def watch(folder: Path, source: object, *options: str, typed: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flash_vstream", "watch", str(source), "--model", str(folder), *options]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False)


def test_watch_answers_lines(tiny_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    done = watch(tiny_folder, video, "--fps", "5", "--loop", typed="what?\n\nwho?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("looked at") == 2


def test_watch_says_why_it_cannot(tiny_folder, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    for source, message in ((tmp_path / "text.mp4", "not a video"), (tmp_path / "none.mp4", "nothing to watch")):
        done = watch(tiny_folder, source, typed="what?\n")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


class Terminal:
    """A program at a terminal of its own: what it has told so far, and keys to press."""

    def __init__(self, *command: str):
        self._outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flash_vstream", *command],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inner),
            env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "30"},
            start_new_session=True,
            preexec_fn=lambda: self._as_a_shell_would(inner),
        )
        os.close(inner)
        self.told = bytearray()
        threading.Thread(target=self._listen, daemon=True).start()

    @staticmethod
    def _as_a_shell_would(inner: int) -> None:
        """Ctrl-C is lost without a controlling terminal, and where the tests themselves run in the background."""
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _listen(self) -> None:
        try:
            while chunk := os.read(self._outer, 4096):
                self.told.extend(chunk)
                if b"\x1b[6n" in chunk:  # where is the cursor? a terminal answers
                    self.press(b"\x1b[1;1R")
        except OSError:
            os.close(self._outer)  # the program has ended

    def press(self, keys: bytes) -> None:
        os.write(self._outer, keys)

    def interrupt(self) -> None:
        """Press Ctrl-C; the program must end cleanly."""
        self.press(b"\x03")
        assert self.process.wait(timeout=20) == 0
        assert b"Traceback" not in self.told
        assert b"Aborted" not in self.told


def test_watch_at_a_terminal(tiny_folder, tmp_path):
    """A status line that moves, a prompt, an answer, and a clean end by Ctrl-C."""
    video = write_video(tmp_path / "clip.mp4", frames=20)
    terminal = Terminal("watch", str(video), "--loop", "--fps", "5", "--model", str(tiny_folder))
    until(lambda: b"memory slots" in terminal.told, 60)
    terminal.press(b"what?\r")
    until(lambda: b"looked at" in terminal.told, 30)
    terminal.interrupt()


def test_watch_can_be_ended_before_the_first_frame(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "silent")
    terminal = Terminal("watch", str(tmp_path / "silent"), "--model", str(tiny_folder))
    until(lambda: b"waiting for the first frame" in terminal.told, 60)
    terminal.interrupt()


def test_watch_can_be_ended_while_it_imports(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "silent")
    terminal = Terminal("watch", str(tmp_path / "silent"), "--model", str(tiny_folder))
    program = psutil.Process(terminal.process.pid)
    until(lambda: [child for child in program.children() if "forkserver" in " ".join(child.cmdline())])
    time.sleep(0.3)
    terminal.interrupt()


def test_one_frame_that_came_just_before_a_question_may_be_missing(tmp_path, tiny):
    model = FlashVStream(*tiny)
    memory = model.new_stream().memory
    pictures, path = Pictures(max_slots(memory)), str(tmp_path / "state")
    shared = SharedTensors.create(path, stream_state(memory, empty_slots(memory), pictures))
    channels = model.model.config.vision_config.hidden_size

    def see(moment: float, seconds_ago: float) -> None:
        memory.write(torch.randn(1, model.model.config.pooled_size**2, channels), [moment])
        shared.publish(stream_state(memory, empty_slots(memory), pictures), {"clock": time.time() - seconds_ago})

    ours, theirs = multiprocessing.Pipe()
    worker = QuestionWorker(model, theirs)

    def told() -> tuple[float, bool]:
        worker.take(Ask(1, path, "What is happening?", max_new_tokens=1))
        while worker.step():
            pass
        events = []
        while ours.poll():
            events.append(ours.recv())
        return events[-1][2]["stream_time"], events[-1][2]["warm"]

    see(0, 9)
    assert told() == (0, False)
    see(1, 0)
    assert told() == (0, True)  # it came as the question did
    see(2, 0)
    assert told() == (2, False)  # not two of them
    see(3, 9)
    assert told() == (3, False)  # it has been there for long
    assert worker.read_ahead() is False
    see(4, 0)
    assert worker.read_ahead() is True
    assert told() == (4, True)
