"""Sources by kind: names and secrets, recordings over HTTP, seeking, folders, odd pictures, old cameras."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.evaluate.media import features_of
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import probe, read_frames
from flash_vstream.video.addresses import hide_secrets, hide_secrets_in_text
from flash_vstream.video.demux import BrokenOffError, Playback
from flash_vstream.video.reader import FrameRate
from flash_vstream.video.sources import Source, open_source, watch_source
from helpers.cli import run
from helpers.videos import write_video
from helpers.web import raw_camera, serving_media, write_playlist

# --- names


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("rtsp://admin:pass@cam:554/1?token=x", "rtsp://cam:554/1?…"),
        ("rtsp://admin:pa/ss@cam/1", "rtsp://cam/1"),
        ("rtsp://admin:pa?ss@cam/1", "rtsp://cam/1"),
        ("rtsp://admin:pa#ss@cam/1", "rtsp://cam/1"),
        ("rtsp://admin:pa@ss@cam/1", "rtsp://cam/1"),
        ("rtsp://admin:p@s/s@cam/1", "rtsp://cam/1"),
        ("rtsp://admin:123/4@cam/1", "rtsp://…@cam/1"),
        ("rtsp://admin:pass@[::1]:554/1", "rtsp://[::1]:554/1"),
        ("rtsp://cam:554/user=admin_password=secret_channel=1_stream=0.sdp", "rtsp://cam:554/user=…"),
        ("rtsp://cam:554/user=admin_password=se/c?r_et_channel=1", "rtsp://cam:554/user=…?…"),
        ("rtsp://cam:554/user=admin_password=se@ret_channel=1", "rtsp://…"),
        ("rtsp://cam/live/PWD%3Dsecret", "rtsp://cam/live/PWD=…"),
        ("rtsp://cam:554/0/admin:secret/main", "rtsp://cam:554/0/…/main"),
        ("rtmps://user:pass@host/app", "rtmps://host/app"),
        ("ftp://user:pass@host/clip.mp4", "ftp://host/clip.mp4"),
        ("RTSPS://user:pass@host/1", "RTSPS://host/1"),
        ("cache:http://user:pass@host/1", "cache:http://host/1"),
        ("concat:http://u:pass@a/1|http://u:pass@b/1", "concat:http://b/1"),
        ("admin:pass@cam/1", "…@cam/1"),
        ("http://[x", "http://[x"),
        ("udp://@239.0.0.1:1234", "udp://239.0.0.1:1234"),
        ("http://host/videos/clip.mp4#t=3", "http://host/videos/clip.mp4"),
        ("/a/file@home.mp4", "/a/file@home.mp4"),
        ("/dev/video0", "/dev/video0"),
    ],
)
def test_what_is_shown_of_a_name(name, shown):
    assert hide_secrets(name) == shown
    assert Source(name).shown == shown
    assert "pass" not in repr(Source(name))


@settings(deadline=None)
@given(some.text(some.characters(exclude_categories=["Cs"]), min_size=1), some.sampled_from(["rtsp", "ftp", "rtmps"]))
def test_no_password_is_ever_shown(extra, scheme):
    assert "hidden" not in hide_secrets(f"{scheme}://admin:{extra}hidden{extra}@cam/1")
    assert "hidden" not in hide_secrets_in_text(f"no: {scheme}://a:hidden@cam/1")


@pytest.mark.parametrize(
    "name", ["http://[x", "rtsp://a:b]c", "rtsp://cam:port/1", "rtsp:///1", "http://a\0b", "é" * 900]
)
def test_names_that_cannot_be_read_are_a_users_error(name):
    Source(name)  # the name can still be stored and shown
    with pytest.raises(UserError):
        Source(name).checked()


def test_a_password_that_must_be_encoded_is_told_so():
    with pytest.raises(UserError, match="%2F") as raised:
        Source("rtsp://admin:pa/ss@cam/1").checked()
    assert "pa/ss" not in str(raised.value)
    assert Source("rtsp://admin:pa%2Fss@cam/1").checked().is_network


def test_a_source_may_outlive_its_file(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=3)
    source = Source(str(video)).checked()
    video.unlink()
    assert not Source(source.name).is_pipe
    assert Source(source.name, begin=1.0).is_finite
    with pytest.raises(UserError, match="nothing to watch"):
        source.checked()
    with pytest.raises(UserError, match="no video at"):
        list(watch_source(source))


# --- recordings on a web server


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    with serving_media(folder) as media:
        yield media


def put_first(path: Path, output: Path) -> Path:
    """Rewrite an MP4 with its index first, as web servers usually have it."""
    with av.open(str(path)) as source, av.open(str(output), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return output


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "m3u8"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_recording_on_a_web_server_has_its_own_clock(web, kind, ranges):
    """It is read in full at its own times and then ends. Regression: one frame was read over and over."""
    web.ranges = ranges
    if kind == "m3u8":
        write_playlist(web.folder / "clip.m3u8", frames=120)
    else:
        write_video(web.folder / f"clip.{kind}", frames=120)
    opened = open_source(Source(f"{web.url}/clip.{kind}", fps=1, size=16, pace="fast"))
    assert not opened.live
    times = [frame.time for frame in opened.frames]
    assert times == pytest.approx(range(12), abs=0.11)


def test_a_playlist_without_an_end_is_live(web):
    write_playlist(web.folder / "live.m3u8", frames=60, ended=False)
    opened = open_source(Source(f"{web.url}/live.m3u8", fps=50, size=16))
    assert opened.live
    assert next(opened.frames).time == 0


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_server_that_breaks_off_is_told_after_what_came(web, kind, tmp_path):
    put_first(write_video(tmp_path / f"clip.{kind}", frames=120), web.folder / f"clip.{kind}")
    web.cut_at = 0.4
    frames = watch_source(Source(f"{web.url}/clip.{kind}", fps=2, size=16, pace="fast"))
    times: list[float] = []
    with pytest.raises(BrokenOffError, match="broke off at") as raised:
        times.extend(frame.time for frame in frames)
    assert 2 <= len(times) < 24
    assert not raised.value.final
    assert "12.0 s" in str(raised.value) or kind == "ts"


def test_a_file_cut_short_is_told_in_the_log(tmp_path, caplog):
    whole = put_first(write_video(tmp_path / "clip.mp4", frames=120), tmp_path / "whole.mp4")
    assert len(list(read_frames(whole, 2, 16))) == 24
    assert not caplog.messages
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 2 < len(list(read_frames(cut, 2, 16))) < 24
    assert "broke off at" in caplog.text
    assert "of 12.0 s" in caplog.text
    with pytest.raises(BrokenOffError):
        list(watch_source(Source(str(cut), 2, 16, pace="fast")))


def test_sound_that_lasts_longer_than_the_picture_is_no_break(tmp_path, caplog):
    path = tmp_path / "long.mkv"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound.layout = "mono"
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode())
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 8000, 8000 * i
            container.mux(sound.encode(frame))
    assert probe(path).duration == pytest.approx(20, abs=0.5)
    assert len(list(read_frames(path, None, 16))) == 10
    assert not caplog.messages


# --- resuming deep inside a file


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("fps", [0.3, 2, 7, None])
@pytest.mark.parametrize("begin", [0.3, 9.901, 19.0, 29.85, 40.0])
def test_seeking_gives_the_same_frames_and_times(tmp_path, kind, fps, begin):
    video = write_video(tmp_path / f"clip.{kind}", frames=300)
    whole = [(frame.time, frame.image) for frame in read_frames(video, fps, 16) if frame.time >= begin - 1e-6]
    parts = [(frame.time, frame.image) for frame in read_frames(video, fps, 16, begin=begin)]
    assert [time for time, _ in parts] == [time for time, _ in whole]
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(parts, whole, strict=True))


@pytest.mark.parametrize("kind", ["mp4", "ts"])
def test_seeking_decodes_little(tmp_path, kind, monkeypatch):
    """Decoding starts at the preceding key frame: from the start, reaching 334 s of 1080p took far too long."""
    video, decoded = write_video(tmp_path / f"clip.{kind}", frames=1000), []
    original = Playback.decoded

    def counted(self, *arguments, **settings):
        for frame in original(self, *arguments, **settings):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Playback, "decoded", counted)
    assert [frame.time for frame in read_frames(video, 10, 16, begin=99.0)] == pytest.approx(np.arange(99, 100, 0.1))
    assert len(decoded) < 60


def test_pictures_out_of_order_are_found_too(tmp_path):
    """H.264 with B-frames and distant key frames, the default of encoders."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "50", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(500):
            image = np.full((48, 64, 3), i % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    for begin in (1.0, 9.98, 15.5):
        whole = [(frame.time, frame.image.mean()) for frame in read_frames(path, 5, 16) if frame.time >= begin]
        assert [(frame.time, frame.image.mean()) for frame in read_frames(path, 5, 16, begin=begin)] == whole


# --- clocks


def test_a_clock_that_starts_anew_goes_on(tmp_path):
    """MPEG-TS: two concatenated recordings, and one whose clock jumps by a day."""
    parts = [write_video(tmp_path / f"{i}.ts", frames=20).read_bytes() for i in range(2)]
    joined, jump = tmp_path / "joined.ts", tmp_path / "jump.ts"
    joined.write_bytes(parts[0] + parts[1])
    times = [frame.time for frame in read_frames(joined, None, 16)]
    assert len(times) >= 39
    assert times[-1] == pytest.approx(3.9, abs=0.3)
    write_video(jump, frames=20, times=[i / 10 + (86_400 if i >= 10 else 0) for i in range(20)])
    times = [frame.time for frame in read_frames(jump, None, 16)]
    assert times[-1] == pytest.approx(1.9, abs=0.3)
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_a_pause_in_a_file_is_a_pause(tmp_path):
    video = write_video(tmp_path / "pause.mkv", frames=3, times=[0.0, 1.0, 40.0])
    assert [frame.time for frame in read_frames(video, 1, 16)] == pytest.approx([0, 1, 40])


@settings(deadline=None)
@given(some.lists(some.floats(0.001, 5), min_size=2, max_size=100), some.floats(0.05, 30))
def test_a_rate_is_never_exceeded(steps, fps):
    rate = FrameRate(fps)
    picked = [time for time in itertools.accumulate(steps) if rate.picks(time)]
    for earlier, later in itertools.pairwise(picked):
        assert later - earlier >= 0.5 / fps - 1e-5
    assert len(picked) <= (picked[-1] - picked[0]) * fps + 2


# --- folders


def picture(path: Path, level: int) -> None:
    Image.new("RGB", (40, 20), (level, 0, 0)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def test_a_folder_passes_over_what_is_no_picture_and_says_so(tmp_path):
    for number in (10, 2, 1):
        picture(tmp_path / f"frame{number}.png", 20 * number)
    (tmp_path / "._frame1.png").write_bytes(b"\0\5\26\7 not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "frame3.jpg").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "album.png").mkdir()
    notes: list[str] = []
    opened = open_source(Source(str(tmp_path), fps=2, size=16, pace="fast"), note=notes.append)
    frames = list(opened.frames)
    assert [frame.time for frame in frames] == [0, 0.5, 1.0]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [20, 40, 200]
    assert len(notes) == 1
    assert "frame3.jpg, notes.txt" in notes[0]
    later = watch_source(Source(str(tmp_path), fps=2, size=16, pace="fast", begin=0.51))
    assert [frame.time for frame in later] == [1.0]


def test_pictures_of_a_folder_are_upright_and_bounded(tmp_path):
    turned = Image.new("RGB", (40, 20), (200, 0, 0))
    turned.paste((0, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to display
    turned.save(tmp_path / "a.jpg", exif=exif)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "b.png")
    notes: list[str] = []
    frames = list(open_source(Source(str(tmp_path), size=16, pace="fast"), note=notes.append).frames)
    assert len(frames) == 1
    assert frames[0].image[:6].mean() < 10 < frames[0].image[10:].mean()
    assert "b.png" in notes[0]


# --- odd pictures


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (40, 900)])
def test_a_long_and_narrow_video_is_cut_to_its_centre(tmp_path, size):
    video = write_video(tmp_path / "narrow.mov", frames=3, size=size, codec="png", pix_fmt="rgb24")
    frames = list(read_frames(video, None, 224))
    assert [frame.image.shape for frame in frames] == [(224, 224, 3)] * 3
    assert next(read_frames(video)).image.shape == (size[1], size[0], 3)


def test_a_narrow_video_can_be_asked_about(tmp_path, tiny_folder):
    video = write_video(tmp_path / "narrow.mov", frames=3, size=(1, 10_000), codec="png", pix_fmt="rgb24")
    done = run("ask", video, "what?", "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_narrow_video_can_be_evaluated(tmp_path, tiny):
    video = write_video(tmp_path / "narrow.mov", frames=3, size=(10_000, 1), codec="png", pix_fmt="rgb24")
    assert [time for time, _ in features_of(FlashVStream(*tiny), video, 1.0, None)] == [0.0]


def huge(path: Path, side: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width = stream.height = side
        stream.pix_fmt = "yuvj420p"
        frame = av.VideoFrame(side, side, "yuvj420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_videos_of_too_many_pixels_are_refused(tmp_path):
    video = huge(tmp_path / "huge.mkv", 8000)
    for use in (probe, lambda path: list(read_frames(path, size=16))):
        with pytest.raises(UserError, match="8000 by 8000"):
            use(video)


def test_large_videos_cost_bounded_memory(tmp_path):
    """The largest decodable square, in a separate process: no full-size RGB, few pictures at once."""
    video = huge(tmp_path / "large.mkv", 5900)
    script = (
        "import resource, sys; from flash_vstream.video import read_frames;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert len(list(read_frames(sys.argv[1], None, 224))) == 1;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, video], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) / 1024 if psutil.LINUX else 0
    assert grown < 400, f"{grown:.0f} MiB"


# --- cameras with unusual MJPEG

JPEGS = []
for _level in (0, 80, 160, 240):
    _file = io.BytesIO()
    Image.new("RGB", (64, 48), (_level, 0, 0)).save(_file, "JPEG")
    JPEGS.append(_file.getvalue())


def dialects() -> dict[str, tuple[bytes, bytes, bytes, bool]]:
    """Per dialect: header, bytes before a picture, bytes after it, and whether its length is given."""
    long = b"123456789000000000000987654321"
    multipart = b"content-type: multipart/x-mixed-replace;boundary="
    image = b"content-type: image/jpeg\r\n"
    return {
        "esp32": (multipart + long, b"\r\n--" + long + b"\r\n" + image, b"", True),
        "esp32-without-length": (multipart + long, b"\r\n--" + long + b"\r\n" + image + b"\r\n", b"", False),
        "boundary-that-was-not-announced": (
            multipart + b"other",
            b"--" + long + b"\r\n" + image + b"\r\n",
            b"\r\n",
            False,
        ),
        "boundary-without-dashes": (multipart + b"--frame", b"frame\r\n" + image + b"\r\n", b"\r\n", False),
        "no-content-type-of-parts": (multipart + b"frame", b"--frame\r\n\r\n", b"\r\n", False),
        "bare-jpegs": (b"content-type: multipart/x-mixed-replace", b"", b"", False),
        "no-header": (b"server: x", b"\r\n--frame\r\n" + image + b"\r\n", b"", False),
    }


@pytest.mark.parametrize("dialect", list(dialects()))
def test_old_cameras_are_understood(dialect):
    header, before, after, has_length = dialects()[dialect]

    def piece(number: int) -> bytes:
        jpeg = JPEGS[number % len(JPEGS)]
        length = b"content-length: %d\r\n\r\n" % len(jpeg) if has_length else b""
        return before + length + jpeg + after

    with raw_camera(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n", piece) as url:
        opened = open_source(Source(url, fps=50, size=16), patience=4)
        frames = list(itertools.islice(opened.frames, 8))
    assert opened.live
    assert {frame.image.shape for frame in frames} == {(16, 16, 3)}
    assert len({int(frame.image[0, 0, 0]) // 20 for frame in frames}) >= 3


def test_a_folder_that_goes_while_it_is_looped_is_missing(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    picture(folder / "a.png", 9)
    frames = watch_source(Source(str(folder), fps=10, size=16, pace="fast", loop=True))
    next(frames)
    os.remove(folder / "a.png")
    folder.rmdir()
    with pytest.raises(UserError, match=r"no video at|not there"):
        list(itertools.islice(frames, 10))
