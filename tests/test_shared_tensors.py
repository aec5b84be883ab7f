"""Tensors in shared memory: consistent reads, bounded size, and space reserved up front."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from flash_vstream.errors import UserError
from flash_vstream.live import shared_tensors
from flash_vstream.live.shared_tensors import NOTES_BYTES, RawTensor, SharedTensors, bounded_json, layout_of
from flash_vstream.video import Frame
from flash_vstream.video.capture import Capture, FrameRing
from flash_vstream.video.shared_memory import FOLDER_VARIABLE, OwnedFolder, reserve, shared_folder
from flash_vstream.video.sources import Source
from helpers.memory import small_memory
from helpers.waiting import until

THREE = layout_of({"a": torch.zeros(3)})


def test_shared_tensors_carry_a_memory_whole(tmp_path):
    memory = small_memory()
    shared = SharedTensors.create(str(tmp_path / "state"), layout_of(memory.state_dict()))
    assert shared.read() is None
    memory.write(torch.randn(9, 4, 8), torch.arange(9))
    shared.publish(memory.state_dict(), {"state": "live"})
    state, notes = SharedTensors(str(tmp_path / "state")).read()
    restored = small_memory()
    restored.load_state_dict(state)
    assert notes == {"state": "live"}
    assert torch.equal(restored.read().tokens(), memory.read().tokens())
    size = shared.nbytes
    for i in range(9, 200):
        memory.write(torch.randn(1, 4, 8), [float(i)])
        shared.publish(memory.state_dict(), {})
    assert shared.nbytes == size == os.path.getsize(shared.path)


def test_tensors_of_every_dtype_and_size_are_read_as_they_were_published(tmp_path):
    state = {
        "features": torch.randn(2, 3).bfloat16(),
        "none": torch.zeros(0, 4, dtype=torch.float64),
        "number": torch.tensor(7),
        "picture": torch.arange(5, dtype=torch.uint8),
    }
    shared = SharedTensors.create(str(tmp_path / "state"), layout_of(state))
    shared.publish(state, {})
    found, _ = shared.read()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    raw, _ = shared.read_raw(("number", "picture", "none"))
    assert raw["number"].array() == 7
    assert raw["picture"].array().tolist() == [0, 1, 2, 3, 4]
    assert (raw["none"].array().shape, raw["none"].array().dtype) == ((0, 4), np.float64)


def test_a_tensor_that_cannot_be_written_to_is_copied():
    raw = RawTensor("float32", (2,), np.frombuffer(np.ones(2, np.float32).tobytes(), np.uint8))
    tensor = raw.tensor()
    tensor += 1
    assert (tensor.tolist(), raw.array().tolist()) == ([2.0, 2.0], [1.0, 1.0])


def test_creating_makes_an_empty_file(tmp_path):
    path = str(tmp_path / "state")
    SharedTensors.create(path, THREE).publish({"a": torch.ones(3)}, {})
    assert SharedTensors(path).read()[0]["a"].sum() == 3
    assert SharedTensors.create(path, THREE).read() is None
    with pytest.raises(FileNotFoundError):
        SharedTensors(str(tmp_path / "none"))


def test_the_status_is_apart_from_the_tensors(tmp_path):
    shared = SharedTensors.create(str(tmp_path / "state"), THREE)
    assert shared.read_status() is None
    shared.publish_status({"state": "failed"})
    assert (shared.read_status(), shared.read()) == ({"state": "failed"}, None)
    for i in range(5):
        shared.publish_status({"state": "live", "number": i})
        assert SharedTensors(shared.path).read_status() == {"state": "live", "number": i}


# --- notes never overflow


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:1/" + "é" * 900, '"' * 1975, "/" + "Ж" * 744, "\x00" * 4000, "😀" * 5000, "\ud800" * 3000],
)
def test_a_text_of_any_length_fits_the_notes(tmp_path, text):
    shared = SharedTensors.create(str(tmp_path / "state"), THREE)
    notes = {"error": f"{text} cannot be opened", "count": 3, "gaps": [[0.1, 1e300]] * 20}
    shared.publish({"a": torch.ones(3)}, notes)
    shared.publish_status(notes)
    for found in (shared.read()[1], shared.read_status()):
        assert found["count"] == 3
        assert found["error"].endswith("cannot be opened")
        assert found["error"][:1] == (text[0] if text[0] != "\ud800" else "?")


def test_what_fits_is_left_alone_and_numbers_that_do_not_are_refused():
    assert json.loads(bounded_json({"error": "é" * 1900})) == {"error": "é" * 1900}
    assert NOTES_BYTES * 0.8 < len(bounded_json({"error": "x" * 9999})) <= NOTES_BYTES
    with pytest.raises(ValueError, match="notes"):
        bounded_json({"gaps": list(range(3000)), "error": "x"})


# --- consistent reads


def _publish_often(path: str, seconds: float) -> None:
    torch.set_num_threads(1)  # otherwise threads wait for each other on a busy machine
    shared = SharedTensors(path)
    deadline, i = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        i += 1
        shared.publish({"a": torch.full((50_000,), float(i)), "b": torch.full((50_000,), float(i))}, {"i": i})
        shared.publish_status({"i": i, "text": str(i) * 200})


def test_a_state_is_never_read_half_written(tmp_path):
    path = str(tmp_path / "state")
    shared = SharedTensors.create(path, layout_of({"a": torch.zeros(50_000), "b": torch.zeros(50_000)}))
    writer = multiprocessing.get_context("spawn").Process(target=_publish_often, args=(path, 1.5))
    writer.start()
    seen = set()
    while writer.is_alive():
        known, status = shared.read(), shared.read_status()
        if known is not None:
            state, notes = known
            assert state["a"].min() == state["a"].max() == state["b"].min() == state["b"].max() == notes["i"]
            seen.add(notes["i"])
        if status is not None:
            assert status["text"] == str(status["i"]) * 200
    assert len(seen) > 20


def test_stores_that_become_visible_out_of_order_are_noticed(tmp_path, monkeypatch):
    """As on CPUs other than x86: the newest version number becomes visible before its bytes."""
    monkeypatch.setattr(shared_tensors, "PATIENCE_SECONDS", 0.05)
    shared = SharedTensors.create(str(tmp_path / "state"), THREE)
    for i in (1.0, 2.0):
        shared.publish({"a": torch.full((3,), i)}, {"i": i})
        shared.publish_status({"i": i})
    place = shared._place(2)
    before = place.copy()
    for at in (0, shared._tensor_bytes + 30):  # in a tensor, and in the notes
        place[at] ^= 1
        state, notes = shared.read()
        assert (float(state["a"].sum()), notes) == (3.0, {"i": 1.0})  # the previous version, complete
        place[:] = before
    assert shared.read()[1] == {"i": 2.0}
    shared._status_place(2)[20] ^= 1
    assert shared.read_status() == {"i": 1.0}
    shared._place(1)[0] ^= 1
    shared._place(2)[0] ^= 1
    assert shared.read() is None  # and does not loop forever


def test_a_torn_frame_is_not_taken(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    ring.write(1, Frame(1.0, np.ones((4, 4, 3), np.uint8)))
    ring._slots["image"][1, 0, 0, 0] ^= 1
    assert ring.newest(0) is None
    ring._slots["image"][1, 0, 0, 0] ^= 1
    assert ring.newest(0) is not None


# --- too little space


def test_too_little_space_is_told_at_creation(tmp_path):
    """A file size limit simulates a full folder: in both cases the space cannot be reserved."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for make in (
            lambda path: FrameRing(path, 256, create=True),
            lambda path: SharedTensors.create(path, THREE),
            lambda path: reserve(path, 20_000),
        ):
            with pytest.raises(UserError, match=FOLDER_VARIABLE):
                make(str(tmp_path / "file"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "file").unlink(missing_ok=True)
    assert list(tmp_path.iterdir()) == []


FULL = """
import os, sys, torch
from flash_vstream.errors import UserError
from flash_vstream.live.shared_tensors import SharedTensors, layout_of
layout, made = layout_of({"a": torch.zeros(100_000)}), []
try:
    while True:
        made.append(SharedTensors.create(f"{sys.argv[1]}/{len(made)}", layout))
except UserError as error:
    for shared in made:
        for _ in range(2):
            shared.publish({"a": torch.ones(100_000)}, {})
    print(len(made), error)
"""


def test_a_full_folder_never_ends_a_process(tmp_path):
    """On a 4 MB file system every state that was created can be written; the next is refused, without SIGBUS."""
    mount = f"mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 3
    assert "No space left" in done.stdout


def test_the_folder_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert shared_folder() == str(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=FOLDER_VARIABLE):
        shared_folder()
    monkeypatch.delenv(FOLDER_VARIABLE)
    assert os.path.isdir(shared_folder())


# --- what a killed process leaves behind


OWNER = """
import sys, time
from flash_vstream.video.shared_memory import OwnedFolder
folder = OwnedFolder("test-kind", sys.argv[1])
print(folder.path, flush=True)
time.sleep(600)
"""


def test_folders_of_killed_processes_are_removed_and_others_are_not(tmp_path):
    def own() -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    (killed, left), (running, kept) = own(), own()
    (tmp_path / "test-kind-of-another-thing").write_text("a file")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert os.path.isdir(left)
    with_both = OwnedFolder("test-kind", str(tmp_path))
    assert not os.path.exists(left)
    assert os.path.isdir(kept)
    running.terminate()
    running.communicate()
    with_both.cleanup()
    with_both.cleanup()
    assert not os.path.exists(with_both.path)
    OwnedFolder("test-kind", str(tmp_path)).cleanup()
    assert [path.name for path in tmp_path.iterdir()] == ["test-kind-of-another-thing"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSYS, f"another file system in {FOLDER_VARIABLE}"), (errno.EMFILE, "limit on open files")],
)
def test_a_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch, code, remedy):
    calls = []

    def fail(*_):
        calls.append(code)
        assert len(calls) < 5
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=f"{tmp_path}.*{remedy}"):
        OwnedFolder("test-kind", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    lock, failures = fcntl.flock, [BlockingIOError(errno.EWOULDBLOCK, "locked by whoever removes it")]

    def race(*arguments):
        if failures:
            raise failures.pop()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", race)
    folder = OwnedFolder("test-kind", str(tmp_path))
    assert os.path.isdir(folder.path)
    folder.cleanup()


PARENT = """
import sys, time
from flash_vstream.video.capture import Capture
from flash_vstream.video.sources import Source
if __name__ == "__main__":
    capture = Capture(Source(sys.argv[1], size=16), sys.argv[2])
    while not capture._spoke:
        capture.newest()
        time.sleep(0.02)
    print(capture._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_reader_ends_with_its_parent_whatever_it_waits_for(tmp_path):
    """Tested with a pipe that has no writer."""
    os.mkfifo(tmp_path / "silent")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, script, tmp_path / "silent", tmp_path]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    reader = int(parent.stdout.readline())
    assert psutil.pid_exists(reader)
    parent.kill()
    parent.communicate()
    until(lambda: not psutil.pid_exists(reader) or psutil.Process(reader).status() == psutil.STATUS_ZOMBIE)


def test_a_source_that_fails_for_hours_is_still_tried(tmp_path):
    """Regression: unbounded doubling of the delay overflowed after a thousand failures (about 80 minutes)."""
    os.mkfifo(tmp_path / "silent")
    capture = Capture(Source(str(tmp_path / "silent"), size=16, loop=True), str(tmp_path), silence=0.1)
    capture._failures = 5000
    until(lambda: capture.newest() is None and capture.status.restarts == 1)
    capture.close()
