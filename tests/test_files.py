"""Atomic writes of files and folders."""

import os
import stat
import threading

import pytest

from flash_vstream.files import atomic_folder, atomic_write, file_sha256, write_text_atomically


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def half_write(path) -> None:
    path.write_text("half")
    raise RuntimeError("the power went out")


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "note.json"
    with atomic_write(target) as scratch:
        scratch.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    write_text_atomically(target, "猫")
    assert target.read_text(encoding="utf-8") == "猫"
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    target = tmp_path / "note.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="power"), atomic_write(target) as scratch:
        half_write(scratch)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError, match="power"), atomic_folder(target) as scratch:
        half_write(scratch / "weights")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as scratch:
        (scratch / "weights").write_text("all")
    assert (target / "weights").read_text() == "all"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mask, file, folder):
    os.umask(mask)
    write_text_atomically(tmp_path / "note", "x")
    with atomic_folder(tmp_path / "model"):
        pass
    assert (mode(tmp_path / "note"), mode(tmp_path / "model")) == (file, folder)


def test_two_writers_at_once_do_not_mix(tmp_path):
    target, texts = tmp_path / "note", [letter * 200_000 for letter in "ab"]
    errors = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                write_text_atomically(target, text)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert target.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(b"a" * 3_000_000)
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert file_sha256(tmp_path / "large") == "2a152c894398719c0570f83fac34ac03a0f6e8e474b995c2403aa5434f7b9dd4"
