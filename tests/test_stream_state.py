"""What a stream shares besides its memory, the state folder, and the question client."""

import io
import math
import os
import signal
import stat
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.published import (
    read_memory_table,
    read_picture,
    read_thumbnails,
    save_state,
    slots_of,
    unpack_thumbnails,
)
from flash_vstream.live.question_client import DIED, QuestionClient
from flash_vstream.live.shared_tensors import SharedTensors, layout_of
from flash_vstream.live.stream_state import Pictures, load_state, max_slots, memory_state, slot_table, stream_state
from flash_vstream.memory import PARTS
from flash_vstream.serve.store import StateFolder
from flash_vstream.video.capture import FrameRing, PushedFrames
from flash_vstream.video.pictures import WHOLE_BYTES
from flash_vstream.video.reader import Frame
from flash_vstream.video.sources import Source
from helpers.memory import small_memory
from helpers.waiting import until


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)


def arrays(pictures: Pictures) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in pictures.state_dict().items()}


def test_thumbnails_are_those_of_the_slots_in_constant_space():
    memory = small_memory()
    pictures = Pictures.of(memory)
    size = sum(value.nbytes for value in pictures.state_dict().values())
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        memory.write(torch.randn(1, 4, 8, generator=generator), [i / 10])
        snapshot = memory.read()
        wanted = {moment for _, slots in snapshot.parts() for moment in slots.exemplar.tolist()}
        pictures.see(Frame(i / 10, noise(i)), wanted)  # noise, the hardest pictures to compress
        assert set(unpack_thumbnails(arrays(pictures))) == wanted
    assert sum(value.nbytes for value in pictures.state_dict().values()) == size
    for jpeg in unpack_thumbnails(arrays(pictures)).values():
        assert Image.open(io.BytesIO(jpeg)).size == (128, 128)


def test_slots_are_shared_as_they_are():
    memory = small_memory()
    rows = max_slots(memory)
    assert slots_of(torch.full((rows, 6), -1.0)) == []
    memory.write(torch.randn(9, 4, 8), torch.arange(9))
    snapshot = memory.read()
    found = slots_of(slot_table(snapshot, rows))
    assert [slot.part for slot in found] == [name for name, slots in snapshot.parts() for _ in range(len(slots))]
    assert sum(slot.weight for slot in found if slot.part == "temporal") == 9
    assert {slot.part for slot in found} == set(PARTS)
    assert found[-1].start == found[-1].exemplar == 8.0


def test_what_was_saved_is_what_was_published(tmp_path):
    memory = small_memory()
    pictures = Pictures.of(memory)
    shared = SharedTensors.create(str(tmp_path / "state"), state_layout(memory))
    assert save_state(shared, tmp_path / "saved.safetensors") is False
    assert (read_memory_table(shared).slots, read_thumbnails(shared), read_picture(shared)) == ([], {}, None)
    memory.write(torch.randn(1, 4, 8), [2.5])
    pictures.see(Frame(2.5, noise(0)), {2.5})
    slots = slot_table(memory.read(), max_slots(memory))
    shared.publish(stream_state(memory, slots, pictures), {"kept": 1, "time": 2.5})
    picture = read_picture(shared)
    assert (Image.open(io.BytesIO(picture.jpeg)).size, picture.time, picture.kept) == ((256, 256), 2.5, 1)
    assert list(read_thumbnails(shared)) == [2.5]
    assert save_state(shared, tmp_path / "saved.safetensors")
    saved, notes = load_state(tmp_path / "saved.safetensors")
    again = small_memory()
    again.load_state_dict(memory_state(saved))
    assert notes == {"kept": 1, "time": 2.5}
    assert torch.equal(again.read().tokens(), memory.read().tokens())
    assert not list(tmp_path.glob("*.part"))


def test_a_dtype_that_numpy_lacks_is_saved_too(tmp_path):
    state = {"memory.features": torch.randn(2, 3).bfloat16(), "memory.frames": torch.tensor(2)}
    shared = SharedTensors.create(str(tmp_path / "state"), layout_of(state))
    shared.publish(state, {})
    assert save_state(shared, tmp_path / "saved.safetensors")
    saved, _ = load_state(tmp_path / "saved.safetensors")
    assert all(torch.equal(saved[name], value) and saved[name].dtype == value.dtype for name, value in state.items())


def test_a_memory_table_is_of_one_moment(tmp_path):
    """The table's slots, count and pictures belong together even while a frame worker publishes all the time."""
    memory = small_memory()
    pictures = Pictures.of(memory)

    class Busy(SharedTensors):
        """Publishes another frame after every read."""

        def read_raw(self, names=None):
            found = super().read_raw(names)
            time = float(memory.frames)
            memory.write(torch.randn(1, 4, 8), [time])
            snapshot = memory.read()
            wanted = {at for _, slots in snapshot.parts() for at in slots.exemplar.tolist()}
            pictures.see(Frame(time, noise(0)), wanted)
            self.publish(stream_state(memory, slot_table(snapshot, max_slots(memory)), pictures), {})
            return found

    SharedTensors.create(str(tmp_path / "state"), state_layout(memory))
    shared = Busy(str(tmp_path / "state"))
    assert read_memory_table(shared).time is None
    for frames in range(1, 12):
        table = read_memory_table(shared)
        assert sum(slot.weight for slot in table.slots if slot.part == "temporal") == table.frames == frames
        assert table.time == frames - 1
        assert set(table.thumbnails) == {slot.exemplar for slot in table.slots}


def test_pushed_frames_are_timed_from_the_first(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    reader = PushedFrames(str(tmp_path / "ring"), 4, fps=2)
    assert reader.newest() is None
    for number, moment in ((1, 1000.0), (2, 1000.5), (3, 1002.0)):
        ring.write(number, Frame(moment, np.zeros((4, 4, 3), np.uint8)))
        if number != 2:
            assert reader.newest().time == moment - 1000.0
    assert (reader.status.came, reader.status.skipped) == (3, 1)
    started = time.monotonic()
    later = PushedFrames(str(tmp_path / "ring"), 4, fps=2, start=100.0)
    ring.write(4, Frame(started + 3.0, np.zeros((4, 4, 3), np.uint8)))
    assert later.newest().time == pytest.approx(103.0, abs=time.monotonic() - started)


def test_a_ring_keeps_whole_pictures_and_knows_a_frames_number(tmp_path):
    ring = FrameRing(str(tmp_path / "ring"), 4, create=True)
    image = np.full((4, 4, 3), 7, np.uint8)
    ring.write(1, Frame(0.5, image, b"whole picture"))
    number, frame = ring.newest(0)
    assert (number, frame.time, frame.whole) == (1, 0.5, b"whole picture")
    ring.write(2, Frame(1.0, image))  # shorter than what its place held before
    assert ring.newest(1)[1].whole == b""
    ring.write(3, Frame(1.5, image, bytes(WHOLE_BYTES + 1)))  # too large: the frame comes without it
    assert ring.newest(2)[1].whole == b""
    # The number of another frame in its place, as when stores become visible out of order.
    ring._slots[3]["sequence"] = 7
    assert ring.newest(2) is None
    ring._slots[3]["sequence"] = 3
    ring._slots[3]["whole_bytes"] = 5
    assert ring.newest(2) is None


# --- the state folder


def test_the_state_folder_keeps_questions_and_streams(tmp_path):
    folder = StateFolder(tmp_path / "state")
    source = Source("rtsp://user:pass@cam/1", 2.0)
    folder.add_stream("a/b", source)
    first, second = folder.ask("a/b", "what?"), folder.ask("a/b", "and now?")
    folder.answer(first, "this", None, {"stream_time": 3.0, "tokens": 1})
    folder.close()
    assert stat.S_IMODE(os.stat(tmp_path / "state").st_mode) == 0o700
    again = StateFolder(tmp_path / "state")
    assert [Source(**saved.fields) for saved in again.saved_streams()] == [source]
    history = again.history("a/b", 10)
    assert [(entry["answer"], entry["error"]) for entry in history] == [("this", None), (None, "the server stopped")]
    assert history[0]["details"]["tokens"] == 1
    assert [entry["id"] for entry in again.history("a/b", 10, before=second)] == [first]
    assert again.memory_path("a/b").parent == tmp_path / "state" / "memories"
    again.remove_stream("a/b")
    assert (again.saved_streams(), again.history("a/b", 10)) == ([], [])
    again.close()


def test_without_a_folder_the_log_is_in_memory():
    folder = StateFolder(None)
    folder.answer(folder.ask("x", "what?"), None, "why", {})
    assert folder.history("x", 1)[0]["error"] == "why"
    assert folder.memory_path("x") is None
    folder.close()


# --- the question client


@pytest.fixture(scope="module")
def question_client(tiny_folder):
    running = QuestionClient(str(tiny_folder))
    yield running
    running.close()


def test_an_answer_comes_in_pieces_and_then_whole(question_client):
    events = list(question_client.ask(None, "hello", (), 6))
    assert [event.kind for event in events[-2:]] == ["text", "done"]
    assert "".join(event.value for event in events[:-1]) == events[-1].value["text"]
    assert not math.isnan(events[-1].value["first_token_seconds"])


def test_a_question_that_nobody_waits_for_is_dropped(question_client):
    waiting = question_client.ask(None, "hello", (), 400)
    assert next(waiting).kind == "text"
    waiting.close()
    started = time.monotonic()
    assert list(question_client.ask(None, "hello", (), 4))[-1].kind == "done"
    assert time.monotonic() - started < 60


def test_mistakes_are_events(question_client, tmp_path):
    (event,) = question_client.ask(str(tmp_path / "none"), "what?")
    assert event.kind == "error"
    assert "not watched" in event.value
    shared = SharedTensors.create(
        str(tmp_path / "empty"), layout_of({"memory.frames": torch.zeros((), dtype=torch.int64)})
    )
    (event,) = question_client.ask(shared.path, "what?")
    assert "not shown a frame" in event.value


def test_a_killed_worker_fails_its_questions_and_comes_back(question_client):
    waiting = question_client.ask(None, "hello", (), 500)
    assert next(waiting).kind == "text"
    os.kill(question_client.worker.pid, signal.SIGKILL)
    assert list(waiting)[-1] == DIED
    until(lambda: list(question_client.ask(None, "hello", (), 2))[-1].kind == "done")
    assert question_client.worker.restarts == 1


def test_a_model_that_cannot_be_loaded_is_told():
    with pytest.raises(UserError, match="no model"):
        QuestionClient("no-such-model")
