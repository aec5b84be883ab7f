"""The state folder: one owner, full disks, damaged databases, and a bounded log."""

import json
import sqlite3
import time

import pytest

from flash_vstream.errors import UserError
from flash_vstream.serve import store as store_module
from flash_vstream.serve.store import StateFolder, StoreError
from flash_vstream.video.sources import Source

PUSH = Source("push")
EVIDENCE = [
    {"part": "temporal", "exemplar": i / 2, "share": 0.1 if i % 2 else 0.0, "thumbnail": "data:image/jpeg;base64," * 99}
    for i in range(30)
]


@pytest.fixture
def store(tmp_path):
    opened = StateFolder(tmp_path)
    yield opened
    opened.close()


def fill_disk(store: StateFolder, full: bool = True) -> None:
    """Make SQLite run out of pages from now on, as on a full disk, or undo that."""
    pages = store._db.execute("pragma page_count").fetchone()[0] if full else 2**30
    store._db.execute(f"pragma max_page_count = {pages}")


def test_two_servers_do_not_share_a_folder(store, tmp_path):
    with pytest.raises(UserError, match=r"used by another server \(process \d+\)"):
        StateFolder(tmp_path)
    store.close()
    StateFolder(tmp_path).close()


def test_a_question_outlives_a_full_disk(store):
    fill_disk(store)
    numbers = [store.ask("door", "what?" * 300) for _ in range(64)]
    for number in numbers:
        store.answer(number, "this", None, {"stream_time": 1.0})
    assert [row["answer"] for row in store.history("door", 100)] == ["this"] * 64
    with pytest.raises(StoreError, match="full"):
        store.flush()
    fill_disk(store, False)
    store.flush()
    assert [row["id"] for row in store.history("door", 100)] == numbers
    assert store._db.execute("select count(*) from questions where answer = 'this'").fetchone() == (64,)


def test_a_full_disk_does_not_fill_the_memory(store, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_UNWRITTEN", 10)
    store._db.execute("pragma query_only = on")
    numbers = [store.ask("door", "what?") for _ in range(30)]
    assert [row["id"] for row in store.history("door", 99)] == numbers[-10:]


def test_streams_are_changed_whole_or_not_at_all(store, tmp_path):
    store.add_stream("door", PUSH)
    store.answer(store.ask("door", "what?"), "this", None, {})
    memory = store.memory_path("door")
    memory.write_bytes(b"memory")
    store._db.execute("pragma query_only = on")
    for change in (
        lambda: store.add_stream("hall", PUSH),
        lambda: store.remove_stream("door"),
        lambda: store.edit_stream("door", "gate", PUSH),
    ):
        with pytest.raises(StoreError, match="readonly"):
            change()
    store._db.execute("pragma query_only = off")
    assert [saved.name for saved in store.saved_streams()] == ["door"]
    assert len(store.history("door", 9)) == 1
    assert memory.exists()
    memory.unlink()
    memory.mkdir()  # cannot be unlinked, so the rows are restored
    with pytest.raises(StoreError):
        store.remove_stream("door")
    assert [saved.name for saved in store.saved_streams()] == ["door"]


def test_memories_that_were_set_aside_do_not_replace_one_another_and_go_with_their_stream(store):
    store.add_stream("door", PUSH)
    store.add_stream("doors", PUSH)
    for number in range(3):
        store.memory_path("door").write_text(str(number))
        store.set_memory_aside("door")
    store.memory_path("doors").write_text("another's")
    store.set_memory_aside("doors")
    folder = store.memory_path("door").parent
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    assert kept == {
        "door.set-aside": "0",
        "door.set-aside-2": "1",
        "door.set-aside-3": "2",
        "doors.set-aside": "another's",
    }
    store.remove_stream("door")
    assert [path.name for path in folder.iterdir()] == ["doors.set-aside"]


def test_an_edited_stream_keeps_its_questions(store):
    store.add_stream("door", PUSH)
    done, under_way = store.ask("door", "what?"), store.ask("door", "and now?")
    store.answer(done, "this", None, {})
    store.edit_stream("door", "gate", Source("push", fps=3))
    store.answer(under_way, "that", None, {})
    assert [row["answer"] for row in store.history("gate", 9)] == ["this", "that"]
    assert store.history("door", 9) == []
    assert store.saved_streams()[0].fields["fps"] == 3


def test_a_question_about_a_stream_that_was_removed_meanwhile_is_forgotten(store):
    store.add_stream("door", PUSH)
    number = store.ask("door", "what?")
    store.remove_stream("door")
    store.answer(number, "this", None, {})
    assert store.history("door", 9) == []


def test_what_cannot_be_read_is_told_and_kept(tmp_path):
    StateFolder(tmp_path).close()
    rows = {"bad": "{", "list": "[1]", "name": '{"name": 5}', "rate": '{"name": "push", "fps": "x"}', "blob": b"\xff\0"}
    rows |= {"new": json.dumps({"name": "push", "shutter": 3, "fps": 1.0})}
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        for name, source in rows.items():
            db.execute("insert into streams values (?, ?, 0)", (name, source))
        for details in ("{", "[1]", '{"evidence": 5}', '{"evidence": [{}]}'):
            row = ("bad", 1e12, "q", "a", details)
            db.execute("insert into questions (stream, asked, question, answer, details) values (?, ?, ?, ?, ?)", row)
    db.close()
    store = StateFolder(tmp_path)
    found = {saved.name: saved for saved in store.saved_streams()}
    assert set(found) == set(rows)
    assert all(saved.fields is None and saved.error for saved in found.values())
    assert "shutter" in found["new"].error
    assert [row["details"] for row in store.history("bad", 9)] == [{}] * 4
    store.close()


def test_a_database_that_is_none_is_a_clear_error(tmp_path):
    (tmp_path / "log.sqlite").write_bytes(b"no database" * 999)
    with pytest.raises(UserError, match="cannot be used"):
        StateFolder(tmp_path)
    (tmp_path / "log.sqlite").unlink()
    StateFolder(tmp_path).close()  # the folder was not left locked


def test_a_question_costs_little_and_pictures_are_kept_once(store):
    store.answer(store.ask("door", "what?"), "this", None, {"evidence": EVIDENCE})
    evidence = store.history("door", 1)[0]["details"]["evidence"]
    assert [slot["exemplar"] for slot in evidence] == [slot["exemplar"] for slot in EVIDENCE if slot["share"]][:8]
    assert not any("thumbnail" in slot for slot in evidence)
    assert store._db.execute("select max(length(details)) from questions").fetchone()[0] < 1500


def test_the_log_is_bounded_in_age_and_size(store, monkeypatch):
    old = store.ask("door", "what?")
    with store._db:
        store._db.execute("update questions set asked = ?", (time.time() - 31 * 86400,))
    for _ in range(200):
        store.answer(store.ask("door", "w" * 4000), "a" * 1000, None, {})
    monkeypatch.setattr(store_module, "KEPT_BYTES", 300_000)
    for _ in range(5):
        store.flush()
    kept = [row["id"] for row in store.history("door", 1000)]
    assert old not in kept
    assert 20 < len(kept) < 80
    assert kept == list(range(max(kept) - len(kept) + 1, max(kept) + 1))  # the newest
