"""Streams described as they go: captions in the state folder's ``transcript.sqlite``, which can be searched."""

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.engine import Questions
from flash_vstream.live.messages import Describe, Report, Watch
from flash_vstream.serve.store import StoreError, Writing, open_database, read_rows

KEPT_CAPTIONS = 100_000
MARK = "describe "
"""Prefix of the ids under which streams are described; no watch's id contains a space."""
FILE = "transcript.sqlite"
_TABLES = """
create table if not exists captions (
    id integer primary key autoincrement, stream text not null, time real not null, clock real not null,
    text text not null
);
create index if not exists captions_of on captions (stream, id);
"""


@dataclass(frozen=True)
class Caption:
    """What was said of a stream at ``time`` (seconds of stream time) and ``clock`` (Unix time)."""

    id: int
    stream: str
    time: float
    clock: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Transcript:
    """The captions of all streams in ``folder``, or with None in memory. Raises ``UserError`` if it cannot be used."""

    def __init__(self, folder: Path | None):
        self._lock = threading.Lock()
        try:
            self._db = open_database(folder, FILE, _TABLES)
            self.newest = int(self._db.execute("select coalesce(max(id), 0) from captions").fetchone()[0])
        except sqlite3.Error as error:
            raise UserError(f"the state folder {folder} cannot be used ({error}); name another with --state") from None

    def add(self, stream: str, time: float, clock: float, text: str) -> None:
        """Save a caption; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            row = (stream, time, clock, text)
            cursor = self._db.execute("insert into captions (stream, time, clock, text) values (?, ?, ?, ?)", row)
            newest = int(cursor.lastrowid or 0)
            self._db.execute("delete from captions where id <= ?", (newest - KEPT_CAPTIONS,))
        self.newest = newest

    def captions(
        self,
        stream: str | None = None,
        limit: int = 50,
        before: int | None = None,
        after: int | None = None,
        words: str = "",
    ) -> list[Caption]:
        """The newest ``limit`` captions before the id ``before``, or the next ones ``after`` an id; oldest first.

        Of one stream or all; those that hold every one of ``words``, whatever their case. Raises ``UserError`` if the
        folder cannot be read any more.
        """
        conditions: list[tuple[str, Any]] = []
        if stream is not None:
            conditions.append(("stream = ?", stream))
        if before is not None:
            conditions.append(("id < ?", before))
        if after is not None:
            conditions.append(("id > ?", after))
        conditions += [("instr(lower(text), ?)", word.lower()) for word in words.split()]
        where = " and ".join(text for text, _ in conditions) or "1"
        order = "asc" if after is not None else "desc"
        with self._lock:
            rows = read_rows(
                self._db,
                f"select id, stream, time, clock, text from captions where {where} order by id {order} limit ?",
                (*(value for _, value in conditions), limit),
            )
        return sorted((Caption(*row) for row in rows), key=lambda caption: caption.id)

    def remove_stream(self, stream: str) -> None:
        """Delete a stream's captions; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            self._db.execute("delete from captions where stream = ?", (stream,))

    def rename_stream(self, name: str, new_name: str) -> None:
        """Keep a stream's captions under a new name; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            self._db.execute("update captions set stream = ? where stream = ?", (new_name, name))

    def remove_other_streams(self, streams: Sequence[str]) -> None:
        """Delete the captions of streams that do not exist any more; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            rows = self._db.execute("select distinct stream from captions").fetchall()
        for (stream,) in rows:
            if stream not in streams:
                self.remove_stream(stream)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()


class Descriptions:
    """Describes every stream once per ``seconds`` of stream time; None turns this off.

    ``place`` tells the path of a stream's shared state and its frame rate, or None while it is not watched.
    """

    def __init__(
        self,
        transcript: Transcript,
        client: Questions,
        place: Callable[[str], tuple[str, float] | None],
        seconds: float | None,
        streams: Sequence[str],
    ):
        self.transcript, self._client, self._place, self._seconds = transcript, client, place, seconds
        self._states: dict[str, dict[str, Any]] = {}
        with suppress(StoreError):
            transcript.remove_other_streams(streams)

    def follow(self, stream: str) -> None:
        """Describe ``stream`` where it is now."""
        place = self._place(stream)
        if self._seconds is None or place is None:
            return
        state = self._states.get(stream, {})
        self._client.set_watch(Watch(MARK + stream, place[0], "", Describe(self._seconds), state))

    def forget(self, stream: str) -> None:
        """Stop describing a stream."""
        self._states.pop(stream, None)
        self._client.drop_watch(MARK + stream)

    def remove_stream(self, stream: str) -> None:
        """Forget a stream and delete its captions; what cannot be deleted now is deleted at the next start."""
        self.forget(stream)
        with suppress(StoreError):
            self.transcript.remove_stream(stream)

    def take(self, report: Report) -> None:
        """Take what the question worker reports of a description; a caption that cannot be written is lost."""
        stream = report.watch.removeprefix(MARK)
        self._states[stream] = report.state
        if report.alert is not None and report.alert.sentence:
            with suppress(StoreError):
                self.transcript.add(stream, report.alert.time, report.alert.clock, report.alert.sentence)
