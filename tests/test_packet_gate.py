"""What is decoded of a recording or a camera: all that the picked frames need, and little else."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from flash_vstream.video import read_frames
from flash_vstream.video.demux import Playback
from flash_vstream.video.packet_gate import PacketGate
from flash_vstream.video.reader import FrameRate, opened, rgb

RATE = 25


def write(path: Path, codec: str = "libx264", seconds: int = 8, **options: str) -> Path:
    """A video of moving noise, each frame different from all others."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 80, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"preset": "ultrafast", "sc_threshold": "0", **options}
        for number in range(seconds * RATE):
            picture = np.ascontiguousarray(noise[:, 2 * (number % 250) :][:, :128])
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def every_frame(path: Path) -> dict[float, np.ndarray]:
    """All frames by their times, decoded without a gate."""
    with opened(path) as (container, stream):
        return {time: rgb(frame) for time, frame in Playback(container, stream).timed()}


def picked(frames: dict[float, np.ndarray], fps: float, slack: float = 0.0) -> list[float]:
    rate = FrameRate(fps, slack)
    return [time for time in frames if rate.picks(time)]


class Counted:
    """Counts the packets that come out of every gate."""

    def __init__(self, monkeypatch):
        self.count = 0
        real = PacketGate.passed

        def passed(gate, packets):
            for packet in real(gate, packets):
                self.count += 1
                yield packet

        monkeypatch.setattr(PacketGate, "passed", passed)


@pytest.fixture
def decoded(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 7.0, None])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("second.mp4", {"g": "25", "bf": "0"}),
        ("between.mkv", {"g": "25", "bf": "3"}),
        ("two.ts", {"g": "50", "bf": "2"}),
        ("odd.mp4", {"g": "33", "bf": "2"}),
        ("fields.ts", {"g": "25", "flags": "+ildct+ilme"}),
        ("seldom.mkv", {"g": "250", "bf": "2"}),
    ],
)
def test_the_frames_are_those_of_a_decoder_that_decodes_all(tmp_path, name, options, fps):
    video = write(tmp_path / name, **options)
    frames = every_frame(video)
    found = list(read_frames(video, fps))
    assert [frame.time for frame in found] == (picked(frames, fps) if fps is not None else list(frames))
    assert all((frame.image == frames[frame.time]).all() for frame in found)


@pytest.mark.parametrize(
    ("codec", "options", "most"),
    [
        ("libx264", {"g": "25", "bf": "0"}, 0.3),
        ("libx264", {"g": "50", "bf": "0"}, 0.75),
        ("mpeg4", {"g": "25"}, 0.3),
        ("mjpeg", {}, 0.15),  # every frame is a key frame
    ],
)
def test_little_else_is_decoded(tmp_path, decoded, codec, options, most):
    """The first groups of pictures are, to see what the key frames are."""
    video = write(tmp_path / "video.mkv", codec, seconds=20, **options)
    frames = every_frame(video)
    assert [frame.time for frame in read_frames(video, 1.0)] == picked(frames, 1.0)
    assert decoded.count < most * len(frames)


def test_pictures_that_are_refreshed_bit_by_bit_are_whole(tmp_path, decoded):
    video = write(tmp_path / "refreshed.ts", g="25", bf="0", **{"x264-params": "intra-refresh=1"})
    frames = every_frame(video)
    found = list(read_frames(video, 1.0))
    assert all((frame.image == frames[frame.time]).all() for frame in found)
    assert decoded.count >= len(frames)


def test_frames_of_an_open_group_are_whole(tmp_path):
    video = write(tmp_path / "open.ts", g="20", bf="3", **{"x264-params": "open-gop=1:b-adapt=0"})
    frames = every_frame(video)
    found = list(read_frames(video, 1.0))
    assert all((frame.image == frames[frame.time]).all() for frame in found)
    expected = picked(frames, 1.0)
    assert len(found) == len(expected)
    assert max(abs(a.time - b) for a, b in zip(found, expected, strict=True)) <= 4 / RATE


def test_reading_from_the_middle_gives_the_same_frames(tmp_path):
    for name in ("second.mp4", "second.ts"):
        video = write(tmp_path / name, g="25", bf="2")
        whole = {frame.time: frame.image for frame in read_frames(video, 1.0)}
        late = list(read_frames(video, 1.0, begin=4.5))
        assert [frame.time for frame in late] == [time for time in whole if time >= 4.5]
        assert all((frame.image == whole[frame.time]).all() for frame in late)


class Clock:
    """A camera's packets, each of which arrives ``delay`` after the moment it shows."""

    def __init__(self, delays: dict[int, float]):
        self.now, self._delays = 0.0, delays

    def arriving(self, packets):
        for number, packet in enumerate(packets):
            self.now = max(self.now, number / RATE + self._delays.get(number, 0.0))
            yield packet


@pytest.mark.parametrize(("delays", "others"), [({}, 0), ({100: 0.6}, 2)])
def test_key_frames_of_a_camera_are_waited_for_but_not_for_long(tmp_path, delays, others):
    """Its frames may be picked a quarter of a tick before or after it; the one at 4 s hangs for 0.6 s."""
    video, rate, clock = write(tmp_path / "camera.ts", g="25", bf="0"), FrameRate(1.0, 0.25), Clock(delays)
    with opened(video) as (container, stream):
        stream.thread_type = "SLICE"
        playback = Playback(container, stream)
        playback.decode_for(rate, lambda: clock.now)
        found = []
        packets = clock.arriving(playback._packets())
        for frame in playback.decoded(packets):
            if rate.picks(clock.now):
                found.append((round(clock.now, 2), bool(frame.key_frame)))
    settled = [(time, is_key) for time, is_key in found if 2.5 < time < 7.5]
    assert sum(not is_key for _, is_key in settled) == others
    assert all(after - before <= 1.65 for before, after in pairwise(time for time, _ in found))


@pytest.mark.parametrize("at", [160, 200, 201])
def test_a_camera_whose_time_stamps_jump_back_is_still_watched(tmp_path, at):
    """In the middle of a group, at a key frame, and between that and when it shows."""
    video, rate, clock = write(tmp_path / "camera.ts", seconds=16, g="50", bf="0"), FrameRate(1.0, 0.25), Clock({})

    def jumping(packets):
        for number, packet in enumerate(packets):
            if number >= at and packet.pts is not None:
                packet.pts -= 5 * 90_000
                packet.dts -= 5 * 90_000
            yield packet

    with opened(video) as (container, stream):
        playback = Playback(container, stream)
        playback.decode_for(rate, lambda: clock.now)
        found = [
            clock.now for _ in playback.decoded(jumping(clock.arriving(playback._packets()))) if rate.picks(clock.now)
        ]
    assert max(after - before for before, after in pairwise(found)) < 2.5
    assert found[-1] > 14
