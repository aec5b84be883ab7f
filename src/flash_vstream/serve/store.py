"""The state folder, from which a restarted server resumes.

Memories and the pictures of their slots are safetensors files; streams, questions and answers are in
SQLite. Only one server may use a folder at a time. This module is independent of processes and HTTP.
"""

import glob
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from flash_vstream.errors import UserError
from flash_vstream.files import set_aside
from flash_vstream.video.sources import Source

KEPT_DAYS = 30
KEPT_BYTES = 64 * 2**20
"""Questions older than this, and the oldest beyond this size of the database, are deleted."""
MOST_UNWRITTEN = 10_000
"""Questions held in memory while the folder cannot be written; beyond that the oldest are lost."""
KEPT_EVIDENCE = 8
"""Slots stored with an answer: those with the largest shares of its attention."""
_TABLES = """
create table if not exists streams (name text primary key, source text not null, created real not null);
create table if not exists questions (
    id integer primary key autoincrement, stream text not null, asked real not null, question text not null,
    answer text, stream_time real, error text, details text
);
create index if not exists questions_of on questions (stream, id);
"""
log = logging.getLogger("flash_vstream.serve")


class StoreError(Exception):
    """The state folder cannot be written; nothing has changed."""


@dataclass(frozen=True)
class SavedStream:
    """A stream in the database: its source's fields, or None and the reason they cannot be read."""

    name: str
    fields: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class _Question:
    """A row of the table ``questions``."""

    id: int
    stream: str
    asked: float
    question: str
    answer: str | None = None
    stream_time: float | None = None
    error: str | None = None
    details: str | None = None


_COLUMNS = ", ".join(field.name for field in fields(_Question))


class StateFolder:
    """Stores streams, memories and questions in ``folder``; with None, keeps only questions, in memory.

    A question never fails because the folder cannot be written: its row waits in memory until ``flush``
    succeeds. Everything else then raises ``StoreError`` and changes nothing.

    Raises ``UserError`` if the folder cannot be used or another server is using it.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._lock = threading.Lock()
        self._unwritten: dict[int, _Question] = {}
        self._open: dict[int, _Question] = {}
        self._owner: FileLock | None = None
        try:
            if folder is not None:
                (folder / "memories").mkdir(parents=True, exist_ok=True)
                folder.chmod(0o700)  # sources may contain passwords
                self._own(folder)
            self._db = open_database(folder, "log.sqlite", _TABLES)
            with self._db:
                # These were in progress when a server died, so they were never answered.
                self._db.execute(
                    "update questions set error = 'the server stopped' where answer is null and error is null"
                )
                newest = self._db.execute("select seq from sqlite_sequence where name = 'questions'").fetchone()
        except (OSError, sqlite3.Error) as error:
            self._disown()
            raise UserError(f"the state folder {folder} cannot be used ({error}); name another with --state") from None
        except UserError:
            self._disown()
            raise
        self._newest = int(newest[0]) if newest else 0

    def _own(self, folder: Path) -> None:
        self._owner = FileLock(folder / "lock", timeout=0, thread_local=False)
        try:
            self._owner.acquire()
        except Timeout:
            self._owner = None
            owner = ""
            with suppress(OSError):
                owner = (folder / "owner").read_text()
            raise UserError(
                f"the state folder {folder} is used by another server (process {owner or 'unknown'});"
                " stop that one, or name another folder with --state"
            ) from None
        (folder / "owner").write_text(str(os.getpid()))

    def _disown(self) -> None:
        if self._owner is not None:
            self._owner.release()

    def memory_path(self, stream: str) -> Path | None:
        """The path of a stream's saved memory, which may not exist yet; None without a folder."""
        return self._folder / "memories" / f"{quote(stream, safe='')}.safetensors" if self._folder is not None else None

    # --- streams

    def add_stream(self, name: str, source: Source) -> None:
        """Save that ``source`` is watched as ``name``, replacing any earlier source."""
        with self._lock, Writing(self._db):
            values = (json.dumps(asdict(source)), time.time())
            self._db.execute(
                "insert into streams (name, source, created) values (?, ?, ?)"
                " on conflict (name) do update set source = excluded.source",
                (name, *values),
            )

    def remove_stream(self, name: str) -> None:
        """Delete a stream with its memory, whatever of it was set aside, and its questions."""
        with self._lock:
            with Writing(self._db):
                self._db.execute("delete from streams where name = ?", (name,))
                self._db.execute("delete from questions where stream = ?", (name,))
                if (path := self.memory_path(name)) is not None:  # an error here rolls the deletions back
                    for own in (path, *path.parent.glob(f"{glob.escape(path.stem)}.set-aside*")):
                        own.unlink(missing_ok=True)
            for rows in (self._unwritten, self._open):
                for number in [row.id for row in rows.values() if row.stream == name]:
                    del rows[number]

    def edit_stream(self, name: str, new_name: str, source: Source) -> None:
        """Change a stream's name and source; keep its questions.

        Its memory must already be at ``memory_path(new_name)``; the one under the old name is deleted.
        """
        with self._lock:
            with Writing(self._db):
                values = (new_name, json.dumps(asdict(source)), name)
                self._db.execute("update streams set name = ?, source = ? where name = ?", values)
                self._db.execute("update questions set stream = ? where stream = ?", (new_name, name))
            for rows in (self._unwritten, self._open):
                rows |= {row.id: replace(row, stream=new_name) for row in list(rows.values()) if row.stream == name}
        path = self.memory_path(name)
        if path is not None and name != new_name:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def set_memory_aside(self, name: str) -> None:
        """Rename a stream's saved memory out of the way, so that the stream starts a new one."""
        path = self.memory_path(name)
        if path is not None and path.exists():
            try:
                set_aside(path)
            except OSError as error:
                raise StoreError(str(error)) from None

    def stream_names(self) -> list[str]:
        """The names of the streams in the database."""
        return [saved.name for saved in self.saved_streams()]

    def saved_streams(self) -> list[SavedStream]:
        """The streams in the database, oldest first; unreadable entries carry the reason.

        Raises ``UserError`` if the database itself cannot be read.
        """
        try:
            with self._lock:
                rows = self._db.execute("select name, source from streams order by created, rowid").fetchall()
        except sqlite3.Error as error:
            raise UserError(f"the state folder {self._folder} cannot be read ({error})") from None
        return [_saved_stream(str(name), source) for name, source in rows]

    # --- questions

    def ask(self, stream: str, question: str) -> int:
        """Log a question before it is answered; returns its id."""
        with self._lock:
            self._newest += 1
            row = _Question(self._newest, stream, time.time(), question)
            self._open[row.id] = row
            self._put(row)
            return row.id

    def answer(self, question: int, text: str | None, error: str | None, details: dict[str, Any]) -> None:
        """Log the outcome of a question: its answer with details, or an error."""
        with self._lock:
            row = self._open.pop(question, None)
            if row is None:
                return  # its stream was removed in the meantime
            stream_time = details.get("stream_time")
            kept = json.dumps(_without_pictures(details))
            self._put(replace(row, answer=text, stream_time=stream_time, error=error, details=kept))

    def _put(self, row: _Question) -> None:
        """Write a row, or hold it until ``flush`` can."""
        try:
            with Writing(self._db):
                self._write(row)
            self._unwritten.pop(row.id, None)
        except StoreError as error:
            self._unwritten[row.id] = row
            while len(self._unwritten) > MOST_UNWRITTEN:
                del self._unwritten[next(iter(self._unwritten))]
            log.error("questions could not be logged", extra={"reason": str(error)})

    def _write(self, row: _Question) -> None:
        values = tuple(asdict(row).values())
        marks = ", ".join("?" * len(values))
        self._db.execute(f"insert or replace into questions ({_COLUMNS}) values ({marks})", values)

    def flush(self) -> None:
        """Retry failed writes, and delete questions beyond the limits on age and size."""
        with self._lock:
            with Writing(self._db):
                for row in self._unwritten.values():
                    self._write(row)
                self._prune()
            self._unwritten.clear()

    def _prune(self) -> None:
        self._db.execute("delete from questions where asked < ?", (time.time() - KEPT_DAYS * 86400,))
        sizes = [self._db.execute(f"pragma {name}").fetchone()[0] for name in ("page_count", "freelist_count")]
        used = (sizes[0] - sizes[1]) * self._db.execute("pragma page_size").fetchone()[0]
        if used > KEPT_BYTES:  # down to nine tenths, so that not every call deletes
            share = 1 - 0.9 * KEPT_BYTES / used
            self._db.execute(
                "delete from questions where id in (select id from questions order by id limit"
                " (select cast(count(*) * ? as integer) + 1 from questions))",
                (share,),
            )

    def history(self, stream: str, limit: int, before: int | None = None) -> list[dict[str, Any]]:
        """The newest ``limit`` questions before the id ``before``, with their outcomes, oldest first."""
        before = before if before is not None else 2**62
        with self._lock:
            try:
                rows = self._db.execute(
                    f"select {_COLUMNS} from questions where stream = ? and id < ? order by id desc limit ?",
                    (stream, before, limit),
                ).fetchall()
            except sqlite3.Error as error:
                log.error("the history cannot be read", extra={"stream": stream, "reason": str(error)})
                rows = []
            questions = {row[0]: _Question(*row) for row in rows}
            questions |= {row.id: row for row in self._unwritten.values() if row.stream == stream and row.id < before}
        entries = [asdict(questions[number]) for number in sorted(questions)[-limit:]]
        for entry in entries:
            del entry["stream"]
            entry["details"] = _details(entry["details"])
        return entries

    def close(self) -> None:
        """Close the database and release the folder."""
        with suppress(StoreError):
            self.flush()
        with self._lock:
            self._db.close()
        self._disown()


def open_database(folder: Path | None, file: str, tables: str) -> sqlite3.Connection:
    """The database in ``file`` of the state folder, or with None one in memory; raises ``sqlite3.Error``.

    ``tables`` is SQL that creates what is missing.
    """
    db = sqlite3.connect(":memory:" if folder is None else str(folder / file), check_same_thread=False)
    with db:
        db.executescript(tables)
        if folder is not None:
            db.execute("pragma journal_mode = wal")
    return db


def read_rows(db: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> list[Any]:
    """The rows of a query; raises ``UserError`` if the database cannot be read."""
    try:
        return db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        log.error("the state folder cannot be read", extra={"reason": str(error)})
        raise UserError(f"the state folder cannot be read ({error})") from None


class Writing:
    """A transaction; any disk error rolls it back and is raised as ``StoreError``."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._db.commit()
                return
        except sqlite3.Error as failed:
            error = failed
        with suppress(sqlite3.Error):
            self._db.rollback()
        if isinstance(error, (sqlite3.Error, OSError)):
            raise StoreError(str(error)) from None


def _saved_stream(name: str, source: Any) -> SavedStream:
    try:
        values = json.loads(source)
    except (ValueError, TypeError):
        return SavedStream(name, None, "what the database holds of it is damaged")
    field_names = {field.name for field in fields(Source)}
    sound = isinstance(values, dict) and isinstance(values.get("name"), str)
    if not sound or not isinstance(values.get("fps", 1.0), (int, float)):
        return SavedStream(name, None, "what the database holds of it is not a source")
    if unknown := sorted(set(values) - field_names):
        return SavedStream(name, None, f"it was saved by another version, with {', '.join(unknown)[:200]}")
    return SavedStream(name, values)


def _details(text: Any) -> dict[str, Any]:
    """An answer's details from the database; empty if damaged."""
    try:
        details: dict[str, Any] = json.loads(text or "{}")
        sound = all(slot.keys() >= {"part", "exemplar"} for slot in details.get("evidence", ()))
    except (ValueError, TypeError, AttributeError):
        return {}
    return details if sound else {}


def _without_pictures(details: dict[str, Any]) -> dict[str, Any]:
    """An answer's details as logged: the slots with the largest shares of attention, without pictures.

    The stream's memory has the pictures, keyed by the time of their frame (``exemplar``).
    """
    if not details.get("evidence"):
        return details
    ranked = sorted(details["evidence"], key=lambda slot: -(slot.get("share") or 0.0))[:KEPT_EVIDENCE]
    evidence = [slot for slot in details["evidence"] if any(slot is kept for kept in ranked)]
    return details | {
        "evidence": [{name: value for name, value in slot.items() if name != "thumbnail"} for slot in evidence]
    }
