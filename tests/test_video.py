"""Real video files made with PyAV, both intact and broken."""

import itertools
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from flash_vstream.errors import UserError
from flash_vstream.video import probe, read_frames
from helpers.videos import write_video


def brightness(image: np.ndarray) -> float:
    return float(image[:, image.shape[1] // 2 + 4 :].mean())


def test_frames_come_at_the_wanted_rate(tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    frames = list(read_frames(video, fps=2))
    assert [frame.time for frame in frames] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert [round(brightness(frame.image) / 8) for frame in frames] == [0, 5, 10, 15, 20, 25]
    assert frames[0].image.shape == (48, 64, 3)
    assert len(list(read_frames(video, fps=None))) == 30
    assert len(list(read_frames(video, fps=1000))) == 30


def test_until_stops_the_reading(tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    assert [frame.time for frame in read_frames(video, 2, until=1.0)] == pytest.approx([0.0, 0.5, 1.0])


def test_probe(tmp_path):
    info = probe(write_video(tmp_path / "clip.mp4"))
    assert (info.width, info.height, info.codec) == (64, 48, "mpeg4")
    assert info.duration == pytest.approx(3.0, abs=0.11)


def test_scaling_crops_the_centre(tmp_path):
    video = write_video(tmp_path / "wide.mp4", frames=20, size=(128, 32))
    image = list(read_frames(video, size=24))[-1].image
    assert image.shape == (24, 24, 3)
    assert image[:, :8].mean() < 12
    assert image[:, 16:].mean() > 60


@pytest.mark.parametrize("size", [(33, 35), (5, 97), (2, 2)])
def test_odd_sizes(tmp_path, size):
    video = write_video(tmp_path / "odd.mkv", frames=3, size=size, codec="ffv1", pix_fmt="bgr0")
    frames = list(read_frames(video, fps=None))
    assert len(frames) == 3
    assert frames[0].image.shape == (size[1], size[0], 3)
    assert next(read_frames(video, size=16)).image.shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [("ffv1", "yuv420p10le", "mkv"), ("png", "rgba", "mov"), ("ffv1", "gray", "mkv"), ("mjpeg", "yuvj420p", "avi")],
)
def test_pixel_formats(tmp_path, codec, pix_fmt, suffix):
    video = write_video(tmp_path / f"format.{suffix}", frames=21, codec=codec, pix_fmt=pix_fmt)
    frames = list(read_frames(video, fps=1))
    assert frames[-1].image.shape == (48, 64, 3)
    assert brightness(frames[-1].image) == pytest.approx(160, abs=6)
    assert frames[-1].image[:, :28].mean() < 8


@pytest.mark.parametrize(("turn", "bright"), [("clockwise", "bottom"), ("counter-clockwise", "top"), ("half", "left")])
def test_rotation_is_applied(tmp_path, turn, bright):
    """As in phone videos: pictures as the sensor saw them, with a display matrix in the header."""
    path = write_video(tmp_path / "phone.mp4", frames=20)
    matrix = {
        "clockwise": (0, 1, 0, -1, 0, 0),
        "counter-clockwise": (0, -1, 0, 1, 0, 0),
        "half": (-1, 0, 0, 0, -1, 0),
    }[turn]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 24] = struct.pack(">6i", *(value << 16 for value in matrix))
    path.write_bytes(data)
    image = list(read_frames(path, fps=None))[-1].image.mean(2)
    height, width = image.shape
    assert (height, width) == ((48, 64) if turn == "half" else (64, 48))
    halves = {
        "top": image[: height // 2 - 2],
        "bottom": image[height // 2 + 2 :],
        "left": image[:, : width // 2 - 2],
        "right": image[:, width // 2 + 2 :],
    }
    assert halves[bright].mean() > 120
    opposite = {"top": "bottom", "bottom": "top", "left": "right"}[bright]
    assert halves[opposite].mean() < 12


def test_variable_frame_rate_keeps_its_times(tmp_path):
    times = [0.0, 0.1, 0.2, 1.9, 2.0, 5.0]
    video = write_video(tmp_path / "vfr.mkv", frames=6, times=times)
    assert [frame.time for frame in read_frames(video, fps=None)] == pytest.approx(times, abs=0.002)
    assert [frame.time for frame in read_frames(video, fps=1)] == pytest.approx([0.0, 1.9, 5.0], abs=0.002)


def test_missing_time_stamps_follow_the_nominal_rate(tmp_path):
    raw = tmp_path / "raw.m4v"  # an elementary stream has no time stamps
    with av.open(str(write_video(tmp_path / "clip.mp4"))) as source:
        packets = [bytes(packet) for packet in source.demux(video=0)]
        header = source.streams.video[0].codec_context.extradata
    raw.write_bytes(bytes(header) + b"".join(packets))
    times = [frame.time for frame in read_frames(raw, fps=None)]
    assert len(times) == 30
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_a_file_that_breaks_off_gives_what_it_has(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", frames=30, codec="ffv1").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: int(len(whole) * 0.6)])
    frames = list(read_frames(cut, fps=None))
    assert 5 < len(frames) < 30


def test_damage_in_the_middle_is_passed_over(tmp_path):
    data = bytearray(write_video(tmp_path / "whole.avi", frames=30, codec="mjpeg", pix_fmt="yuvj420p").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = os.urandom(300)
    broken = tmp_path / "broken.avi"
    broken.write_bytes(data)
    assert len(list(read_frames(broken, fps=None))) >= 20


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))


def test_unusable_input_is_one_clear_error(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    audio_only(tmp_path / "sound.wav")
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole[: len(whole) // 2])
    cases = {
        "missing.mp4": "no video at",
        "empty.mp4": "is empty",
        "text.mp4": "not a video that FFmpeg can open",
        "sound.wav": "only sound",
        "headless.mp4": "not a video",
        ".": "is a folder",
    }
    for name, message in cases.items():
        for use in (lambda path: list(read_frames(path)), probe):
            with pytest.raises(UserError, match=message):
                use(tmp_path / name)


def test_bad_rates_are_refused(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=3)
    with pytest.raises(UserError, match="above 0"):
        list(read_frames(video, fps=0))
