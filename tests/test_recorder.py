"""The recorder beside a real frame worker: what it does when the disk is slow or full."""

import threading

import pytest

from flash_vstream.live.streams import LiveStreams
from flash_vstream.serve import recordings as module
from flash_vstream.serve.recorder import Recorder
from flash_vstream.serve.recordings import Recordings
from flash_vstream.video.sources import Source
from helpers.videos import write_video
from helpers.waiting import until


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory):
    video = write_video(tmp_path_factory.mktemp("recorder") / "clip.mp4", frames=20)
    with LiveStreams(str(tiny_folder)) as streams:
        streams.add("door", Source(str(video), fps=5, loop=True))
        streams.add("yard", Source(str(video), fps=5, loop=True, record=False))
        yield streams


@pytest.fixture
def recordings(tmp_path):
    opened = Recordings(tmp_path / "recordings", 10**6, ())
    for stream in ("door", "yard"):
        opened.follow(stream)
    return opened


def test_a_disk_that_hangs_holds_up_no_frame(live, recordings, monkeypatch):
    write, hanging = recordings.write, threading.Event()

    def slow(*arguments):
        hanging.wait(120)
        return write(*arguments)

    monkeypatch.setattr(recordings, "write", slow)
    recorder = Recorder(recordings, live)
    kept = live.status("door").kept
    until(lambda: live.status("door").kept > kept + 8)
    assert (recordings.frames, recorder.missed) == (0, 0)  # none waits anywhere
    hanging.set()
    until(lambda: recordings.frames > 3)
    assert recorder.missed >= 6
    recorder.close()


def test_a_full_disk_is_reported_until_it_is_not(live, recordings, monkeypatch):
    monkeypatch.setattr(module, "RESERVE_BYTES", 2**62)
    recorder = Recorder(recordings, live)
    until(lambda: recorder.error)
    assert "free on the disk" in recorder.error
    until(lambda: recorder.missed > 2)
    monkeypatch.setattr(module, "RESERVE_BYTES", 0)
    until(lambda: recorder.error is None and recordings.frames > 2)
    recorder.close()


def test_only_streams_that_may_be_are_recorded(live, recordings):
    recorder = Recorder(recordings, live)
    assert (recorder.records("door"), recorder.records("yard"), recorder.records("none")) == (True, False, False)
    until(lambda: recordings.frames > 2)
    recorder.close()
    recorded = [recordings.of(name).segments for name in ("door", "yard")]
    assert [bool(segments) for segments in recorded] == [True, False]
    assert Recorder(Recordings(None, None, ()), live).records("door") is False
