"""Clips: only real containers are accepted, and killed servers leave nothing behind."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import pytest
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.serve.clips import FOLDER, Clips, is_container
from flash_vstream.serve.security import ApiError
from flash_vstream.video import read_frames
from helpers.videos import write_video


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts", "a.flv"])
def test_files_of_moving_pictures_are_known(tmp_path, name):
    path = write_video(tmp_path / name, frames=20, codec="flv" if name == "a.flv" else "mpeg4")
    assert is_container(path.read_bytes())
    assert len(list(read_frames(path, None))) == 20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ffconcat version 1.0\nfile x\n",
        b"#EXTM3U\n",
        b"v=0\r\nc=IN IP4 10.0.0.5\r\n",
        b"<?xml?><MPD></MPD>",
        b"RIFF\0\0\0\0WAVE",
        b"G" + b"x" * 300,
    ],
)
def test_what_names_other_files_is_not(data):
    assert not is_container(data)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile '{0}'\n", "#EXTM3U\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n"])
def test_a_file_that_names_another_is_not_followed(tmp_path, text):
    write_video(tmp_path / "sibling.ts", frames=5, rate=25)
    for name in ("list.mp4", "list.m3u8"):
        (tmp_path / name).write_text(text.format("sibling.ts"))
        with pytest.raises(UserError, match="not a video"):
            list(read_frames(tmp_path / name))


def test_clips_of_killed_servers_are_deleted_and_those_of_running_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, time; from pathlib import Path; from flash_vstream.video.shared_memory import OwnedFolder;"
        f"folder = OwnedFolder({FOLDER!r}, sys.argv[1]); Path(folder.path, 'clip').write_bytes(b'x');"
        "print(folder.path, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, running = (Path(server.stdout.readline().strip()) for server in servers)
        servers[0].kill()
        servers[0].wait()
        clips = Clips(None)
        assert not killed.exists()
        assert (running / "clip").exists()
        clips.close()
        assert list(tmp_path.iterdir()) == [running]
    finally:
        for server in servers:
            server.kill()
            server.communicate()


@pytest.mark.parametrize("media", [b"RIFF....AVI ", [Image.new("RGB", (8, 8))]])
def test_a_disk_that_cannot_be_written_is_told_and_the_place_is_free_again(media):
    clips = Clips(None)
    shutil.rmtree(clips._folder)
    with pytest.raises(ApiError, match="cannot be kept") as refused:
        clips.add(media, 1.0)
    assert (refused.value.status, clips.in_progress) == (409, 0)
    clips.close()


def test_the_bundled_ffmpeg_knows_the_formats_that_are_allowed():
    from flash_vstream.video.gateway import CONTAINERS
    from flash_vstream.video.reader import FILE_OPTIONS

    available = {name for names in av.formats_available for name in names.split(",")}
    assert set(CONTAINERS.split(",")) <= available
    assert set(FILE_OPTIONS["format_whitelist"].split(",")) <= available
