"""A state folder behind a URL of fsspec."""

import itertools
import json
import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from flash_vstream.errors import UserError
from flash_vstream.serve import state_url
from flash_vstream.serve.security import AccessRules
from flash_vstream.serve.service import NamedSource, Service
from flash_vstream.serve.state_url import StateUrl
from flash_vstream.serve.store import StateFolder, StoreError
from flash_vstream.video.sources import Source
from helpers.cli import run
from helpers.videos import write_video
from helpers.waiting import until

numbers = itertools.count()


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    """No other server starts at the same moment."""
    monkeypatch.setattr(state_url, "SETTLE_SECONDS", 0.0)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://state-{next(numbers)}/door" if request.param == "memory" else f"file://{tmp_path}/far"


@pytest.fixture
def opened(url):
    states = []

    def at(place=url):
        states.append(StateUrl(place))
        return states[-1]

    yield at
    for state in states:
        state._own.cleanup()


def fill(folder):
    store = StateFolder(folder)
    store.add_stream("door", Source("rtsp://camera/1"))
    store.answer(store.ask("door", "who is it?"), "nobody", None, {})
    store.memory_path("door").write_bytes(b"a memory")
    return store


def test_another_server_goes_on_from_what_one_has_uploaded(opened, url, monkeypatch):
    first = opened()
    store = fill(first.folder)
    first.upload()  # and then it dies
    with pytest.raises(UserError, match=r"is used by another server \(process \d+ on .*stop that one, or wait 60 s"):
        opened()
    monkeypatch.setattr(state_url, "LEASE_SECONDS", 0.0)
    second = opened()
    found = StateFolder(second.folder)
    assert found.stream_names() == ["door"]
    assert [entry["answer"] for entry in found.history("door", 10)] == ["nobody"]
    assert found.memory_path("door").read_bytes() == b"a memory"
    with pytest.raises(StoreError, match="is used by another server now"):
        first.upload()
    found.close()
    store.close()


def test_of_two_servers_that_start_at_once_only_one_does(opened, monkeypatch):
    both_checked = threading.Barrier(2, timeout=10)
    checked = StateUrl._check_free
    monkeypatch.setattr(StateUrl, "_check_free", lambda self: (checked(self), both_checked.wait()))
    monkeypatch.setattr(state_url, "SETTLE_SECONDS", 0.3)
    outcomes = []

    def start():
        try:
            opened()
            outcomes.append("started")
        except UserError as error:
            outcomes.append("taken" if "taken by another server just now" in str(error) else str(error))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["started", "taken"]


def test_a_lease_is_taken_before_anything_is_downloaded_and_given_up_if_that_fails(opened, url, monkeypatch):
    files, root = fsspec.url_to_fs(url)
    seen = []

    def fail(self):
        seen.append(json.loads(files.cat_file(f"{root}/{state_url.LEASE}"))["id"] == self._id)
        raise PermissionError("not yours")

    monkeypatch.setattr(StateUrl, "_download", fail)
    with pytest.raises(UserError, match="not yours"):
        opened()
    assert (seen, files.exists(f"{root}/{state_url.LEASE}")) == ([True], False)


def test_uploads_take_turns(opened, monkeypatch):
    state, at_work = opened(), []
    fill(state.folder).close()
    real = state._put

    def put(name):
        at_work.append(name)
        assert len(at_work) == 1
        time.sleep(0.05)
        real(name)
        at_work.remove(name)

    monkeypatch.setattr(state, "_put", put)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(state.upload) for _ in range(2)]:
            done.result()


def test_every_memory_that_was_kept_comes_back(opened):
    first = opened()
    fill(first.folder).close()
    names = ["a..b.safetensors", "door.set-aside", "door.set-aside-2"]
    for name in names:
        (first.folder / "memories" / name).write_bytes(b"kept")
    first.close()
    found = {path.name for path in (opened().folder / "memories").iterdir()}
    assert found >= set(names)


def test_what_a_server_has_closed_is_free_again(opened):
    first = opened()
    fill(first.folder).close()
    first.close()
    assert not first.folder.exists()
    second = opened()
    assert StateFolder(second.folder).stream_names() == ["door"]
    second.close()


def test_only_changes_are_uploaded(opened, monkeypatch):
    state, put = opened(), []
    store = fill(state.folder)
    real = state._put
    monkeypatch.setattr(state, "_put", lambda name: put.append(name) or real(name))
    state.upload()
    assert sorted(put) == ["log.sqlite", "memories/door.safetensors"]
    put.clear()
    state.upload()
    assert put == []
    store.ask("door", "and now?")
    state.upload()
    assert put == ["log.sqlite"]
    store.remove_stream("door")
    state.upload()
    files, root = state._files, state._root
    assert [Path(name).name for name in files.find(root)] == ["log.sqlite", state_url.LEASE]
    store.close()


def test_a_state_that_cannot_be_uploaded_is_kept(opened, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    state = opened()
    fill(state.folder).close()

    def fail(*_):
        raise PermissionError("no more room")

    monkeypatch.setattr(state, "_put", fail)
    with pytest.raises(StoreError, match="no more room"):
        state.upload()
    with caplog.at_level(logging.ERROR):
        state.close()
    (record,) = caplog.records
    assert "no more room" in record.reason
    assert StateFolder(Path(record.kept)).stream_names() == ["door"]


def test_a_damaged_lease_and_strange_files_do_no_harm(opened, url):
    files, root = fsspec.url_to_fs(url)
    files.makedirs(f"{root}/memories", exist_ok=True)
    files.pipe_file(f"{root}/{state_url.LEASE}", b"{")
    files.pipe_file(f"{root}/memories/notes.txt", b"?")
    state = opened()
    assert [path.name for path in (state.folder / "memories").iterdir()] == []
    assert json.loads(files.cat_file(f"{root}/{state_url.LEASE}"))["pid"]


@pytest.mark.parametrize("wrong", ["nosuch://bucket/x", "http://127.0.0.1:1/x"])
def test_a_url_that_cannot_be_used_is_an_error_of_the_command(wrong, quick_folder):
    done = run("serve", "--port", "0", "--model", quick_folder, "--state", wrong)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"--state {wrong} cannot be used" in " ".join(done.stderr.split())


def test_a_server_resumes_from_a_url(quick_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    url = f"memory://state-{next(numbers)}"
    first = Service(str(quick_folder), AccessRules(), url, streams={"door": NamedSource(str(video), 5.0)})
    until(lambda: first.status("door").state == "ended")
    kept = first.status("door").kept
    first.close()
    video.unlink()
    second = Service(str(quick_folder), AccessRules(), url)
    until(lambda: second.status("door").kept == kept)
    assert second.status("door").state == "ended"
    second.close()
