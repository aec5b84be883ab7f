"""Live sources, the frame worker, and surviving kill -9, with real processes and the tiny model."""

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
from flash_vstream.live import supervisor
from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.messages import Ask
from flash_vstream.live.question_worker import QuestionWorker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import Pictures, empty_slots, stream_state
from flash_vstream.live.streams import LiveStreams
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import Frame
from flash_vstream.video.capture import Capture, FrameRing
from flash_vstream.video.shared_memory import FOLDER_VARIABLE
from flash_vstream.video.sources import Source, hide_secrets, watch_source
from helpers.videos import write_video
from helpers.waiting import until

# --- sources


def test_a_file_plays_at_its_own_pace_and_loops(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=10)
    started = time.monotonic()
    frames = watch_source(Source(str(video), fps=5, size=16, loop=True))
    times = [next(frames).time for _ in range(8)]
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4], abs=0.02)
    assert 1.3 < time.monotonic() - started < 15
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
        Source(**{"name": "rtsp://host/1", **settings}).checked()


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


def read_to_the_end(reader: Capture) -> list[Frame]:
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
    reader = Capture(Source(str(video), fps=10, size=16, pace="fast"), str(tmp_path))
    frames = read_to_the_end(reader)
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(30)], abs=0.01)
    assert (reader.status.came, reader.status.skipped, reader.status.state) == (30, 0, "ended")


def test_a_slow_taker_gets_the_newest_and_the_rest_is_counted(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=30)
    reader = Capture(Source(str(video), fps=10, size=16), str(tmp_path))
    first = until(reader.newest)
    begun = reader._number
    until(lambda: (found := reader._ring.newest(0)) is not None and found[0] > begun + 6)
    second = until(reader.newest)
    assert second.time - first.time > 0.5
    assert reader.status.skipped >= 4
    assert reader.status.came == reader.status.skipped + 2
    reader.close()


def test_a_killed_reader_comes_back_and_time_goes_on(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    reader = Capture(Source(str(video), fps=10, size=16, loop=True), str(tmp_path))
    before = until(reader.newest)
    os.kill(reader._process.pid, signal.SIGKILL)
    gap = time.monotonic()
    until(lambda: reader.newest() is None and reader.status.state == "reconnecting")
    after = until(reader.newest)
    assert reader.status.restarts == 1
    assert after.time - before.time == pytest.approx(time.monotonic() - gap, abs=3)
    reader.close()


def test_a_source_that_sends_nothing_is_opened_again(tmp_path):
    pipe = tmp_path / "silent"
    os.mkfifo(pipe)
    reader = Capture(Source(str(pipe), size=16, loop=True), str(tmp_path), silence=0.5)
    until(lambda: reader.newest() is None and reader.status.restarts >= 1)
    assert "nothing came" in reader.status.error
    reader.close()


def test_a_live_source_that_ends_is_opened_again(tmp_path):
    """A pipe read as a live source, whose writer disappears and returns."""
    video = write_video(tmp_path / "clip.mkv", frames=10, codec="ffv1").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        threading.Thread(target=pipe.write_bytes, args=(video,), daemon=True).start()

    reader = Capture(Source(str(pipe), fps=50, size=16, loop=True), str(tmp_path))
    write()
    first = until(reader.newest)
    until(lambda: (reader.newest(), reader.status.restarts)[1] == 1)
    assert "ended" in reader.status.error
    write()
    assert until(reader.newest).time > first.time
    reader.close()


def test_a_file_that_cannot_be_read_fails_for_good(tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    reader = Capture(Source(str(tmp_path / "text.mp4"), size=16), str(tmp_path))
    assert read_to_the_end(reader) == []
    assert reader.status.state == "failed"
    assert "not a video" in reader.status.error


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
    until(lambda: live.status("door").kept >= later.frames)  # a memory is published just before its status
    until(lambda: live.status("door").lag < 2)
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


def test_one_failing_stream_leaves_the_others_alone_even_over_a_kill(live, looped, tmp_path):
    """A finished file is deleted and the frame worker killed: the other stream continues; this one stays ended."""
    video = write_video(tmp_path / "once.mp4", frames=4)
    live.add("once", Source(str(video), fps=10))
    live.add("door", looped)
    until(lambda: live.status("once").state == "ended" and live.status("door").kept > 0)
    video.unlink()
    restarts, kept = live.worker.restarts, live.status("once").kept
    os.kill(live.worker.pid, signal.SIGKILL)
    until(lambda: live.worker.restarts > restarts)
    before = live.status("door").kept
    until(lambda: live.status("door").kept > before + 2)
    assert live.worker.restarts == restarts + 1
    assert (live.status("once").state, live.status("once").kept) == ("ended", kept)
    live.remove("once")
    live.remove("door")


def test_a_hung_frame_worker_is_started_again(live, looped, monkeypatch):
    live.add("door", looped)
    until(lambda: live.status("door").kept > 0)
    restarts = live.worker.restarts
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 2.0)
    psutil.Process(live.worker.pid).suspend()
    until(lambda: live.worker.restarts > restarts)
    monkeypatch.undo()
    kept = live.status("door").kept
    until(lambda: live.status("door").kept > kept)
    live.remove("door")


def test_too_little_shared_memory_is_told_and_nothing_is_left(live, looped, monkeypatch):
    def refuse(path: str, size: int) -> None:
        raise UserError("no space")

    folder = Path(live._folder.path)
    before = sorted(folder.iterdir())
    monkeypatch.setattr("flash_vstream.live.streams.check_space", refuse)
    with pytest.raises(UserError, match="no space"):
        live.add("door", looped)
    assert live.names() == []
    assert sorted(folder.iterdir()) == before


def test_a_shared_folder_that_cannot_be_written_is_told(live, looped, tmp_path, monkeypatch):
    monkeypatch.setattr(live._folder, "path", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="shared memory cannot be written"):
        live.add("door", looped)
    assert live.names() == []


def test_closing_twice_gives_everything_back(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    live = LiveStreams(str(tiny_folder))
    live.add("pushed", Source("push"))
    live.close()
    live.close()
    assert not live.worker.alive
    assert list(tmp_path.iterdir()) == []


# --- the command


def watch(folder: Path, source: object, *options: str, typed: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flash_vstream", "watch", str(source), "--model", str(folder), *options]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=600, check=False)


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
    """A program in its own terminal, with its output so far and a way to press keys."""

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
        self.shown = bytearray()
        threading.Thread(target=self._listen, daemon=True).start()

    @staticmethod
    def _as_a_shell_would(inner: int) -> None:
        """Set up Ctrl-C, which is lost without a controlling terminal or when the tests run in the background."""
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _listen(self) -> None:
        try:
            while chunk := os.read(self._outer, 4096):
                self.shown.extend(chunk)
                if b"\x1b[6n" in chunk:  # a cursor position query, which a terminal answers
                    self.press(b"\x1b[1;1R")
        except OSError:
            os.close(self._outer)  # the program has ended

    def press(self, keys: bytes) -> None:
        os.write(self._outer, keys)

    def interrupt(self) -> None:
        """Press Ctrl-C; the program must exit cleanly."""
        self.press(b"\x03")
        assert self.process.wait(timeout=120) == 0
        assert b"Traceback" not in self.shown
        assert b"Aborted" not in self.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_watch_leaves_nothing_behind_when_it_is_ended(tiny_folder, tmp_path, number):
    """Ended by a signal instead of Ctrl-C: processes end and shared memory is released."""
    video = write_video(tmp_path / "clip.mp4", frames=20)
    (tmp_path / "shared").mkdir()
    command = [sys.executable, "-m", "flash_vstream", "watch", str(video), "--loop", "--model", str(tiny_folder)]
    process = subprocess.Popen(
        command,
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        env={**os.environ, FOLDER_VARIABLE: str(tmp_path / "shared")},
        text=True,
    )
    process.stdin.write("what?\n")
    process.stdin.flush()
    until(lambda: "looked at" in process.stdout.readline())
    children = psutil.Process(process.pid).children(recursive=True)
    assert list((tmp_path / "shared").iterdir())
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not list((tmp_path / "shared").iterdir())
    assert not psutil.wait_procs(children, timeout=120)[1]


def test_watch_at_a_terminal(tiny_folder, tmp_path):
    """A live status line, a prompt, an answer, and a clean exit on Ctrl-C."""
    video = write_video(tmp_path / "clip.mp4", frames=20)
    terminal = Terminal("watch", str(video), "--loop", "--fps", "5", "--model", str(tiny_folder))
    until(lambda: b"memory slots" in terminal.shown)
    terminal.press(b"what?\r")
    until(lambda: b"memory slots" in terminal.shown.rpartition(b"looked at")[2])  # the prompt is back
    terminal.interrupt()


def test_watch_can_be_ended_before_the_first_frame(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "silent")
    terminal = Terminal("watch", str(tmp_path / "silent"), "--model", str(tiny_folder))
    until(lambda: b"waiting for the first frame" in terminal.shown)
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
    pictures, path = Pictures.of(memory), str(tmp_path / "state")
    shared = SharedTensors.create(path, state_layout(memory))
    channels = model.model.config.vision_config.hidden_size

    def see(moment: float, seconds_ago: float) -> None:
        memory.write(torch.randn(1, model.model.config.pooled_size**2, channels), [moment])
        shared.publish(
            stream_state(memory, empty_slots(memory), pictures), {"monotonic": time.monotonic() - seconds_ago}
        )

    ours, theirs = multiprocessing.Pipe()
    worker = QuestionWorker(model, theirs)

    def asked() -> tuple[float, bool]:
        worker.take(Ask(1, path, "What is happening?", max_new_tokens=1))
        while worker.step():
            pass
        events = []
        while ours.poll():
            events.append(ours.recv())
        return events[-1][2]["stream_time"], events[-1][2]["warm"]

    see(0, 9)
    assert asked() == (0, False)
    see(1, 0)
    assert asked() == (0, True)  # it arrived together with the question
    see(2, 0)
    assert asked() == (2, False)  # two missing frames are too many
    see(3, 9)
    assert asked() == (3, False)  # it arrived long before the question
    assert worker.read_ahead() is False
    see(4, 0)
    assert worker.read_ahead() is True
    assert asked() == (4, True)
