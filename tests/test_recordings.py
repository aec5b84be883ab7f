"""Recordings on disk: their bound, what a kill or a full disk leaves, and which frames show a moment."""

import io
import os
import resource
import signal
from contextlib import contextmanager
from itertools import islice

import av
import pytest
from PIL import Image

from flash_vstream.cli.options import record_bytes
from flash_vstream.errors import UserError
from flash_vstream.serve import recordings as module
from flash_vstream.serve.recordings import RecordedFrame, Recordings
from flash_vstream.serve.store import StoreError

CLOCK = 1.7e9


def jpeg(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (grey, grey, grey)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def opened(tmp_path):
    """Opens recordings in one folder, as servers do one after the other."""

    def start(most: int | None = 10**6, streams=("door", "yard")) -> Recordings:
        recordings = Recordings(tmp_path / "recordings", most, streams)
        for stream in streams:
            recordings.follow(stream)
        return recordings

    return start


def write(
    recordings: Recordings, time: float, stream: str = "door", clock: float | None = None, data: bytes = b""
) -> bool:
    recording = recordings.of(stream)
    assert recording is not None
    return recordings.write(recording, RecordedFrame(time, CLOCK + time if clock is None else clock, data or jpeg()))


def times(recordings: Recordings, begin: float, end: float, clock: float = CLOCK, stream: str = "door") -> list[float]:
    return [frame.time for frame in recordings.frames_around(stream, begin, end, clock)]


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_bound_holds_after_every_frame_and_the_oldest_go_first(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 3000)
    recordings = opened(20_000)
    for i in range(200):
        write(recordings, i / 2, ("door", "yard")[i % 2])
        size = sum(path.stat().st_size for path in files(tmp_path))
        assert size == recordings.bytes <= 20_000
    assert recordings.frames == 200
    door, yard = times(recordings, 0, 100), times(recordings, 0, 100, stream="yard")
    assert (door[-1], yard[-1]) == (99.0, 99.5)
    assert abs(door[0] - yard[0]) < 5
    assert door[0] > 80
    assert door == [door[0] + i for i in range(len(door))]
    smaller = opened(8000)  # started again with less
    assert sum(path.stat().st_size for path in files(tmp_path)) == smaller.bytes <= 8000
    assert times(smaller, 0, 100)[-1] == 99


def test_a_kill_loses_at_most_the_frame_being_written(opened, tmp_path):
    killed = opened()
    for time in range(5):
        write(killed, float(time), data=jpeg(40 * time))
    (path,) = files(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    after = opened()
    assert after.bytes == path.stat().st_size
    assert times(after, 0, 10) == [0, 1, 2, 3]
    assert write(after, 5.0)
    assert times(after, 0, 10) == [0, 1, 2, 3, 5]
    with av.open(str(path), format="mpjpeg") as container:  # other programs can read it too
        whole = islice(container.decode(video=0), 4)
        shown = [int(frame.to_ndarray(format="gray").mean()) for frame in whole]
    assert shown == [pytest.approx(40 * time, abs=2) for time in range(4)]


@contextmanager
def full_from(size: int):
    """No file of this process can grow beyond ``size`` bytes."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_a_full_disk_takes_only_in_part_is_taken_back(opened, tmp_path):
    recordings = opened()
    write(recordings, 0.0)
    (path,) = files(tmp_path)
    size = path.stat().st_size
    with full_from(size + 100), pytest.raises(OSError, match="full"):
        write(recordings, 1.0)
    assert path.stat().st_size == size == recordings.bytes
    assert write(recordings, 2.0)
    assert times(recordings, 0, 5) == [0, 2]


def test_recordings_do_not_grow_on_a_disk_that_is_nearly_full(opened, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2000)
    recordings = opened()
    for time in range(20):
        write(recordings, float(time))
    size = recordings.bytes
    monkeypatch.setattr(module, "RESERVE_BYTES", 2**62)
    for time in range(20, 40):
        write(recordings, float(time))
        assert recordings.bytes <= size
    assert times(recordings, 0, 50)[-1] == 39
    recordings.remove_stream("door")
    with pytest.raises(OSError, match="free on the disk"):
        write(recordings, 0.0, "yard")


def test_a_moment_is_shown_by_frames_of_its_own_run(opened, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_SECONDS", 10.0)
    recordings = opened()
    for time in range(28):
        write(recordings, float(time), clock=CLOCK + time)
    for time in range(18, 45):  # went on from a memory that was saved ten seconds earlier
        write(recordings, float(time), clock=CLOCK + 20 + time)
    for time in range(45):  # another source
        write(recordings, float(time), clock=CLOCK + 5000 + time)
    for again in (recordings, opened()):
        assert times(again, 20, 30, CLOCK + 25) == [*range(20, 28)]
        assert times(again, 20, 30, CLOCK + 45) == [*range(20, 31)]
        assert times(again, 20, 30, CLOCK + 5025) == [*range(20, 31)]
        assert again.frames_around("door", 30, 40, CLOCK + 5035)[0].clock == CLOCK + 5030
        assert times(again, 20, 30, CLOCK + 3000) == []  # nothing of that hour
        assert times(again, 60, 70, CLOCK) == times(again, 0, 5, CLOCK, "nowhere") == []


def test_a_frame_that_is_recorded_again_after_a_restart_is_shown_once(opened):
    write(opened(), 7.0)
    recordings = opened()
    write(recordings, 7.0)
    write(recordings, 8.0)
    assert times(recordings, 0, 10) == [7, 8]


def test_a_recording_follows_its_stream_and_ends_with_it(opened, tmp_path):
    recordings = opened()
    write(recordings, 1.0)
    write(recordings, 1.0, "yard")
    door = recordings.of("door")
    recordings.rename_stream("door", "gate")
    assert recordings.of("door") is None
    write(recordings, 2.0, "gate")
    assert times(recordings, 0, 5, stream="gate") == [1, 2]
    (tmp_path / "recordings" / "taken").mkdir()
    (tmp_path / "recordings" / "taken" / "file").touch()
    with pytest.raises(StoreError):
        recordings.rename_stream("gate", "taken")
    assert times(recordings, 0, 5, stream="gate") == [1, 2]
    recordings.remove_stream("gate")
    recordings.follow("gate")  # another stream of this name
    assert not recordings.write(door, RecordedFrame(3.0, CLOCK, jpeg()))
    assert times(recordings, 0, 5, stream="gate") == []
    (kept,) = [path for path in files(tmp_path) if path.suffix == ".mjpeg"]
    assert (kept.parent.name, recordings.bytes) == ("yard", kept.stat().st_size)
    after = opened(streams=("door",))  # and what was left over of others
    assert (after.bytes, files(tmp_path)) == (0, [])


def test_without_a_bound_what_there_is_stays_and_nothing_is_added(opened):
    write(opened(), 1.0)
    recordings = opened(None)
    assert not write(recordings, 2.0)
    assert times(recordings, 0, 5) == [1]


def test_sizes_are_written_as_people_write_them():
    assert (record_bytes(None), record_bytes("500MB"), record_bytes("1.5 gb")) == (None, 500_000_000, 1_500_000_000)
    for text, message in (("2", "is not a size"), ("-1GB", "is not a size"), ("1MB", "at least 64MB")):
        with pytest.raises(UserError, match=message):
            record_bytes(text)
