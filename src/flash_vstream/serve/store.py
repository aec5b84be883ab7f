"""The state folder: what a server that is started again goes on from.

Memories with the pictures of their slots are safetensors, written atomically; streams, questions
and answers lie in SQLite. Nothing here knows of processes or HTTP.
"""

import json
import sqlite3
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flash_vstream.errors import UserError
from flash_vstream.video.sources import Source

_TABLES = """
create table if not exists streams (name text primary key, source text not null, created real not null);
create table if not exists questions (
    id integer primary key autoincrement, stream text not null, asked real not null, question text not null,
    answer text, stream_time real, error text, details text
);
create index if not exists questions_of on questions (stream, id);
"""


class StateFolder:
    """Streams, memories and the log of questions under ``folder``; without one, the log in memory alone.

    Raises ``UserError`` when the folder cannot be written.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._lock = threading.Lock()
        try:
            if folder is not None:
                (folder / "memories").mkdir(parents=True, exist_ok=True)
                folder.chmod(0o700)  # sources may carry passwords
            path = ":memory:" if folder is None else str(folder / "log.sqlite")
            self._log = sqlite3.connect(path, check_same_thread=False)
            with self._log:
                self._log.executescript(_TABLES)
                if folder is not None:
                    self._log.execute("pragma journal_mode = wal")
                # Questions that were under way when a server died were not answered.
                self._log.execute(
                    "update questions set error = 'the server stopped' where answer is null and error is null"
                )
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the state folder {folder} cannot be used ({error}); name another with --state") from None

    def memory_path(self, stream: str) -> Path | None:
        """Where a stream's memory is saved, whether it is there or not."""
        return self._folder / "memories" / f"{quote(stream, safe='')}.safetensors" if self._folder is not None else None

    def add_stream(self, name: str, source: Source) -> None:
        """Remember that ``source`` is watched as ``name``."""
        with self._lock, self._log:
            values = (name, json.dumps(asdict(source)), time.time())
            self._log.execute("insert or replace into streams values (?, ?, ?)", values)

    def remove_stream(self, name: str) -> None:
        """Forget a stream with its memory and its questions."""
        with self._lock, self._log:
            self._log.execute("delete from streams where name = ?", (name,))
            self._log.execute("delete from questions where stream = ?", (name,))
        if (path := self.memory_path(name)) is not None:
            path.unlink(missing_ok=True)

    def streams(self) -> dict[str, dict[str, Any]]:
        """The streams that were watched, as the fields of their sources."""
        with self._lock:
            rows = self._log.execute("select name, source from streams order by created").fetchall()
        return {name: json.loads(source) for name, source in rows}

    def ask(self, stream: str, question: str) -> int:
        """Log a question before it is answered; returns its id."""
        with self._lock, self._log:
            values = (stream, time.time(), question)
            row = self._log.execute("insert into questions (stream, asked, question) values (?, ?, ?)", values)
            assert row.lastrowid is not None
            return row.lastrowid

    def answer(self, question: int, text: str | None, error: str | None, details: dict[str, Any]) -> None:
        """Log what came of a question: its answer with details, or why there is none."""
        with self._lock, self._log:
            values = (text, details.get("stream_time"), error, json.dumps(details), question)
            self._log.execute(
                "update questions set answer = ?, stream_time = ?, error = ?, details = ? where id = ?", values
            )

    def history(self, stream: str, limit: int, before: int | None = None) -> list[dict[str, Any]]:
        """The newest ``limit`` questions (older than the id ``before``) with what came of them, oldest first."""
        with self._lock:
            rows = self._log.execute(
                "select id, asked, question, answer, stream_time, error, details from questions"
                " where stream = ? and id < ? order by id desc limit ?",
                (stream, before if before is not None else 2**62, limit),
            ).fetchall()
        names = ("id", "asked", "question", "answer", "stream_time", "error", "details")
        found = [dict(zip(names, row, strict=True)) for row in reversed(rows)]
        for entry in found:
            entry["details"] = json.loads(entry["details"]) if entry["details"] else {}
        return found

    def close(self) -> None:
        """Close the log."""
        with self._lock:
            self._log.close()
