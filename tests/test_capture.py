"""A source in its own process: silence, hangs, ends, restarts, stream time, pushed frames, leftovers."""

import gc
import io
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.video import Frame
from flash_vstream.video import capture as capturing
from flash_vstream.video.capture import Capture, FrameRing, PushedFrames, wait_for_any
from flash_vstream.video.sources import Source
from helpers.videos import write_video
from helpers.waiting import until
from helpers.web import raw_camera, serving_media, write_playlist


def until_over(capture: Capture, seconds: float = 60.0) -> list[Frame]:
    """The frames that arrive until the capture has ended or failed."""
    frames: list[Frame] = []

    def step() -> bool:
        while (frame := capture.newest()) is not None:
            frames.append(frame)
        return capture.status.state in ("ended", "failed")

    until(step, seconds)
    capture.close()
    return frames


def until_state(capture: Capture, state: str) -> None:
    until(lambda: (capture.newest(), capture.status.state)[1] == state, 60)


def kill_reader(capture: Capture) -> None:
    assert capture._process is not None
    os.kill(capture._process.pid, signal.SIGKILL)


# --- recordings on a web server


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    with serving_media(folder) as media:
        yield media


@pytest.mark.parametrize("kind", ["mkv", "ts", "m3u8"])
def test_a_recording_on_a_web_server_is_read_once_and_has_ended(web, tmp_path, kind):
    if kind == "m3u8":
        write_playlist(web.folder / "clip.m3u8", frames=100)
    else:
        write_video(web.folder / f"clip.{kind}", frames=100)
    capture = Capture(Source(f"{web.url}/clip.{kind}", fps=1, size=16, pace="fast"), str(tmp_path))
    frames = until_over(capture)
    assert [frame.time for frame in frames] == pytest.approx(range(10), abs=0.11)
    assert (capture.status.state, capture.status.error, capture.status.restarts) == ("ended", None, 0)


def test_a_recording_goes_on_where_its_server_broke_off(web, tmp_path):
    write_video(web.folder / "clip.mkv", frames=100)
    web.cut_at = 0.5
    capture = Capture(Source(f"{web.url}/clip.mkv", fps=2, size=16, pace="fast"), str(tmp_path))
    frames: list[Frame] = []
    until(lambda: (frames.append(capture.newest()), capture.status.state)[1] == "reconnecting", 60)
    assert "broke off at" in (capture.status.error or "")
    web.cut_at = 1.0
    frames = [frame for frame in frames if frame is not None] + until_over(capture)
    assert [frame.time for frame in frames] == pytest.approx(np.arange(0, 10, 0.5), abs=0.11)
    assert (capture.status.state, capture.status.error) == ("ended", None)


def test_a_recording_whose_server_stays_broken_fails_and_says_where(web, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "RECORDING_TRIES", 2)
    write_video(web.folder / "clip.mkv", frames=100)
    web.cut_at = 0.5
    capture = Capture(Source(f"{web.url}/clip.mkv", fps=2, size=16, pace="fast"), str(tmp_path))
    frames = until_over(capture)
    assert 2 < len(frames) < 20
    assert capture.status.state == "failed"
    assert "broke off at" in capture.status.error
    assert "of 10.0 s" in capture.status.error


def test_a_file_cut_short_has_ended_with_an_error(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", frames=100).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    capture = Capture(Source(str(tmp_path / "cut.mkv"), fps=2, size=16, pace="fast"), str(tmp_path))
    assert 2 < len(until_over(capture)) < 20
    assert capture.status.state == "ended"
    assert "of 10.0 s" in capture.status.error


def test_why_a_file_on_a_web_server_cannot_be_opened(web, tmp_path):
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (web.folder / "headless.mp4").write_bytes(whole[: len(whole) - 300])
    for name, reason in (("headless.mp4", "error reading header"), ("none.mp4", "404")):
        address = f"{web.url}/{name}".replace("http://", "http://user:hidden@")
        capture = Capture(Source(address, size=16), str(tmp_path))
        until_state(capture, "reconnecting")
        assert reason in capture.status.error
        assert "could not be opened" in capture.status.error
        assert "hidden" not in capture.status.error
        capture.close()


# --- silence


def test_slow_rates_and_pauses_are_no_silence(tmp_path, monkeypatch):
    """A reader reports that it is decoding, sleeping or waiting, however long it has no frame to deliver."""
    monkeypatch.setattr(capturing, "LOCAL_SILENCE_SECONDS", 4.0)
    pause = write_video(tmp_path / "pause.mkv", frames=3, times=[0.0, 6.0, 6.1])
    slow = write_video(tmp_path / "slow.mkv", frames=60, rate=10)
    captures = [
        Capture(Source(str(pause), fps=10, size=16), str(tmp_path)),
        Capture(Source(str(slow), fps=0.2, size=16), str(tmp_path)),
    ]
    waiting = Capture(Source(str(slow), fps=10, size=16, pace="fast"), str(tmp_path))
    until(lambda: waiting.newest())
    assert [[frame.time for frame in until_over(capture)] for capture in captures] == [
        pytest.approx([0, 6, 6.1], abs=0.01),
        pytest.approx([0, 5], abs=0.01),
    ]
    assert len(until_over(waiting)) == 59  # its consumer paused for five seconds
    assert [capture.status.restarts for capture in [*captures, waiting]] == [0, 0, 0]


def test_a_reader_that_starts_slowly_has_not_failed(tmp_path, monkeypatch):
    """Only an error from the reader itself is final."""
    monkeypatch.setattr(capturing, "START_SECONDS", 0.01)
    video = write_video(tmp_path / "clip.mp4")
    capture = Capture(Source(str(video), fps=10, size=16, pace="fast"), str(tmp_path))
    until_state(capture, "reconnecting")
    assert "nothing came" in capture.status.error
    monkeypatch.setattr(capturing, "START_SECONDS", 120.0)
    assert len(until_over(capture)) == 30
    assert capture.status.state == "ended"


def test_a_hang_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "LOCAL_SILENCE_SECONDS", 1.5)
    video = write_video(tmp_path / "clip.mp4", frames=20)
    capture = Capture(Source(str(video), fps=10, size=16, loop=True), str(tmp_path))
    before = until(capture.newest)
    assert capture._process is not None
    psutil.Process(capture._process.pid).suspend()
    until_state(capture, "reconnecting")
    assert "nothing came" in capture.status.error
    assert until(capture.newest).time > before.time
    capture.close()


def test_a_camera_slower_than_the_usual_silence_is_given_more_time(tmp_path):
    """It is reopened a few times at most; after that, every frame arrives over one connection."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (99, 0, 0)).save(file, "JPEG")
    part = b"--frame\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n" % len(file.getvalue())

    def piece(number: int) -> bytes:
        time.sleep(0.8 if number else 0)
        return part + file.getvalue() + b"\r\n"

    head = b"HTTP/1.1 200 OK\r\ncontent-type: multipart/x-mixed-replace;boundary=frame\r\n\r\n"
    with raw_camera(head, piece, 0) as url:
        capture = Capture(Source(url, fps=100, size=16), str(tmp_path), silence=0.5)
        until(lambda: capture.newest() is None and capture.status.restarts >= 1, 60)
        restarts, slow_frames = -1, 0
        deadline = time.monotonic() + 90
        while slow_frames < 3 and time.monotonic() < deadline:
            if capture.status.restarts != restarts:
                restarts, slow_frames = capture.status.restarts, 0
            slow_frames += capture.newest() is not None
            time.sleep(0.01)
        assert slow_frames == 3
        assert restarts <= 6
        capture.close()


# --- folders


def test_a_folder_that_is_removed_is_waited_for(tmp_path):
    folder = tmp_path / "pictures"

    def fill() -> None:
        folder.mkdir()
        for number in range(3):
            Image.new("RGB", (40, 20), (60 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / "notes.txt").write_text("no picture")

    fill()
    capture = Capture(Source(str(folder), fps=10, size=16, loop=True), str(tmp_path))
    before = until(capture.newest)
    until(lambda: capture.newest() and capture.status.note)
    assert "notes.txt" in capture.status.note
    shutil.rmtree(folder)
    until_state(capture, "reconnecting")
    fill()
    after = until(capture.newest, 60)
    assert after.time > before.time
    capture.close()


# --- stream time


def test_stream_time_begins_where_it_is_told_to(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=50)
    source = Source(str(video), fps=2, size=16, pace="fast", begin=2.0)
    capture = Capture(source, str(tmp_path), start=100.0)
    assert [frame.time for frame in until_over(capture)] == pytest.approx(100 + np.arange(0, 3, 0.5), abs=0.01)
    assert capture.position == pytest.approx(4.5, abs=0.01)


def test_a_live_source_goes_by_the_clock_from_its_start(tmp_path):
    """Also across restarts: opening counts as stream time, and the wall clock has no effect."""
    video = write_video(tmp_path / "clip.mkv", frames=20, codec="ffv1").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        threading.Thread(target=pipe.write_bytes, args=(video,), daemon=True).start()

    started = time.monotonic()
    capture = Capture(Source(str(pipe), fps=100, size=16, loop=True), str(tmp_path), start=50.0, silence=60)
    write()
    first = until(capture.newest, 60)
    # Twenty frames come at once, and follow each other by a hundredth of a second.
    assert 50.0 < first.time <= 50.0 + time.monotonic() - started + 0.2
    until_state(capture, "reconnecting")
    time.sleep(0.5)
    again = time.monotonic()
    write()
    after = until(capture.newest, 60)
    assert 50.0 + again - started <= after.time + 0.1
    assert after.time <= 50.0 + time.monotonic() - started + 0.2
    assert capture.position is None
    capture.close()


def test_pushed_frames_honour_the_rate(tmp_path):
    """Ten frames a second arrive and two are wanted; the rest are neither kept nor counted as skipped."""
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    pushed = PushedFrames(str(tmp_path / "ring"), 4, fps=2)
    times = []
    for number in range(1, 101):
        ring.write(number, Frame(1000 + number / 10, np.zeros((4, 4, 3), np.uint8)))
        if (frame := pushed.newest()) is not None:
            times.append(frame.time)
    assert len(times) in (20, 21)
    assert np.diff(times).min() > 0.24
    assert (pushed.status.came, pushed.status.skipped) == (len(times), 0)
    for number in range(101, 151):  # nothing is read for five seconds
        ring.write(number, Frame(1000 + number / 10, np.zeros((4, 4, 3), np.uint8)))
    assert pushed.newest() is not None
    assert 7 <= pushed.status.skipped <= 10


def test_the_last_frame_pushed_is_kept_though_it_came_early(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    pushed = PushedFrames(str(tmp_path / "ring"), 4, fps=5)
    for number in (1, 2):
        ring.write(number, Frame(time.monotonic(), np.full((4, 4, 3), number, np.uint8)))
        frame = until(pushed.newest)
        assert frame.image[0, 0, 0] == number
    assert pushed.newest() is None
    assert pushed.status.came == 2


def test_frames_that_come_at_the_wanted_rate_are_all_kept(tmp_path):
    """Browser timers are inexact: a frame that arrives slightly early is not lost."""
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    pushed = PushedFrames(str(tmp_path / "ring"), 4, fps=2)
    for number in range(1, 41):
        ring.write(number, Frame(number / 2 + 0.08 * (-1) ** number, np.zeros((4, 4, 3), np.uint8)))
        assert pushed.newest() is not None


def test_pushed_stream_time_never_falls(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    started = time.monotonic()
    pushed = PushedFrames(str(tmp_path / "ring"), 4, fps=100, start=3600.0)
    times = []
    for number, moment in enumerate((started - 5, started + 1, started + 0.5, started + 2), 1):
        ring.write(number, Frame(moment, np.zeros((4, 4, 3), np.uint8)))
        if (frame := pushed.newest()) is not None:
            times.append(frame.time)
    assert times == sorted(times)
    assert times[0] >= 3600
    assert times[-1] == pytest.approx(3602, abs=0.5)


# --- shared memory, descriptors


def test_a_torn_frame_is_not_taken(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    ring.write(1, Frame(1.0, np.full((4, 4, 3), 7, np.uint8)))
    ring._slots[1]["image"][0, 0, 0] = 8  # as another CPU may see it: the number before the picture
    assert ring.newest(0) is None


def test_too_little_shared_memory_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="shared memory"):
        Capture(Source("rtsp://cam/1", size=16), str(tmp_path))
    with pytest.raises(UserError, match="shared memory"):
        FrameRing(str(tmp_path / "ring"), 16, create=True)


def test_killed_readers_leave_nothing_behind(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    shared = tmp_path / "shared"
    shared.mkdir()
    own = psutil.Process()
    capture = Capture(Source(str(video), fps=10, size=16, loop=True), str(shared))
    until(capture.newest)
    gc.collect()  # what other tests left
    before = own.num_fds()
    for _ in range(4):
        kill_reader(capture)
        until_state(capture, "reconnecting")
        until(capture.newest, 60)
    assert own.num_fds() <= before
    assert list(shared.iterdir()) == []  # the ring has no file name, so nothing can be left behind
    capture.close()
    wait_for_any([capture], 0.01)
    assert own.num_fds() < before
    assert not [child for child in own.children() if "spawn_main" in " ".join(child.cmdline())]


def test_waiting_ends_when_a_frame_comes(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    capture = Capture(Source(str(video), fps=10, size=16, loop=True), str(tmp_path))
    assert capture.fileno() is None
    until(capture.newest)
    started = time.monotonic()
    wait_for_any([capture], 120)
    assert time.monotonic() - started < 100
    capture.close()


def test_a_file_that_is_gone_is_waited_for(tmp_path):
    """The reader is killed while the file is temporarily missing: no exception, and the stream does not end."""
    video = write_video(tmp_path / "clip.mp4", frames=100)
    hidden = Path(f"{video}.hidden")
    capture = Capture(Source(str(video), fps=10, size=16), str(tmp_path))
    before = until(capture.newest)
    video.rename(hidden)
    kill_reader(capture)
    until(lambda: capture.newest() is None and "no video at" in (capture.status.error or ""), 60)
    assert capture.status.state == "reconnecting"
    hidden.rename(video)
    assert until(capture.newest, 60).time > before.time
    capture.close()
