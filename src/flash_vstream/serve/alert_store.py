"""Watches, alerts, and what is still to be delivered of them, in the state folder's ``alerts.sqlite``.

An alert is written together with its watch's state and its deliveries, so that a server which is killed at any moment
either has the alert and delivers it, or finds its event again.
"""

import json
import logging
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.serve.store import StoreError, Writing, open_database, read_rows

KEPT_ALERTS = 1000
"""The newest alerts kept, with their pictures of up to 64 kB each; what was not delivered of older ones is lost."""
_TABLES = """
create table if not exists watches (
    id text primary key, stream text not null, made real not null, spec text not null, state text not null
);
create table if not exists alerts (
    number integer primary key autoincrement, id text not null unique, watch text not null, stream text not null,
    body text not null, picture blob
);
create index if not exists alerts_of on alerts (stream, number);
create index if not exists alerts_by on alerts (watch, number);
create table if not exists deliveries (
    number integer not null, target text not null, tries integer not null, primary key (number, target)
);
create table if not exists retained (broker text not null, topic text not null, primary key (broker, topic));
"""
_URL = "json_extract(d.target, '$.url')"
_IS_WEBHOOK = f"{_URL} not like 'mqtt%'"
log = logging.getLogger("flash_vstream.serve")


@dataclass(frozen=True)
class SavedWatch:
    """A watch as it is saved: what was asked for (``spec``) and its state at its newest alert or save."""

    id: str
    stream: str
    made: float
    spec: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class SavedAlert:
    """An alert: ``number`` rises with each, ``id`` is what receivers know it by."""

    number: int
    id: str
    watch: str
    stream: str
    body: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What callers and receivers are told; without the picture."""
        return {"id": self.id, "watch": self.watch, "stream": self.stream, **self.body}


@dataclass(frozen=True)
class Delivery:
    """An alert that a target has not acknowledged yet, after ``tries`` tries."""

    alert: SavedAlert
    target: dict[str, Any]
    tries: int
    picture: bytes | None


class AlertStore:
    """Keeps watches and alerts in ``folder``, or with None in memory.

    Raises ``UserError`` if the folder cannot be used, as does whatever reads, once it cannot be read any more.
    """

    def __init__(self, folder: Path | None):
        self._lock = threading.RLock()
        self._unwritten: deque[tuple[Any, ...]] = deque(maxlen=KEPT_ALERTS)
        try:
            self._db = open_database(folder, "alerts.sqlite", _TABLES)
            self.newest = int(self._db.execute("select coalesce(max(number), 0) from alerts").fetchone()[0])
        except sqlite3.Error as error:
            raise UserError(f"the state folder {folder} cannot be used ({error}); name another with --state") from None

    # --- watches

    def put_watch(self, watch: SavedWatch) -> None:
        """Save a watch, replacing the one with its id; raises ``StoreError``."""
        values = (watch.id, watch.stream, watch.made, json.dumps(watch.spec), json.dumps(watch.state))
        with self._lock, Writing(self._db):
            self._db.execute("insert or replace into watches values (?, ?, ?, ?, ?)", values)

    def put_states(self, states: dict[str, dict[str, Any]]) -> None:
        """Save the states of watches; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            rows = [(json.dumps(state), watch) for watch, state in states.items()]
            self._db.executemany("update watches set state = ? where id = ?", rows)

    def remove_watch(self, watch: str) -> None:
        """Delete a watch and what is still to be delivered of it; its alerts stay. Raises ``StoreError``."""
        with self._lock, Writing(self._db):
            self._db.execute("delete from watches where id = ?", (watch,))
            self._db.execute(
                "delete from deliveries where number in (select number from alerts where watch = ?)", (watch,)
            )

    def remove_stream(self, stream: str) -> None:
        """Delete a stream's watches and alerts; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            of = "(select number from alerts where stream = ?)"
            self._db.execute(f"delete from deliveries where number in {of}", (stream,))
            for table in ("watches", "alerts"):
                self._db.execute(f"delete from {table} where stream = ?", (stream,))

    def remove_other_streams(self, streams: Sequence[str]) -> None:
        """Delete what belongs to streams that do not exist any more; raises ``StoreError``."""
        with self._lock:
            with Writing(self._db):
                rows = self._db.execute("select stream from watches union select stream from alerts").fetchall()
            for (stream,) in rows:
                if stream not in streams:
                    self.remove_stream(stream)

    def rename_stream(self, name: str, new_name: str) -> None:
        """Keep a stream's watches and alerts under a new name; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            for table in ("watches", "alerts"):
                self._db.execute(f"update {table} set stream = ? where stream = ?", (new_name, name))

    def watches(self) -> list[SavedWatch]:
        """Every watch, oldest first; those that cannot be read are left out and logged."""
        found = []
        rows = self._rows("select id, stream, made, spec, state from watches order by made, rowid")
        for watch, stream, made, spec, state in rows:
            try:
                found.append(SavedWatch(watch, stream, made, dict(json.loads(spec)), dict(json.loads(state))))
            except (ValueError, TypeError):
                log.warning("a watch cannot be read", extra={"watch": watch})
        return found

    # --- alerts

    def add_alert(
        self,
        watch: SavedWatch,
        state: dict[str, Any],
        body: dict[str, Any],
        picture: bytes | None,
        targets: Sequence[dict[str, Any]],
        recorded: bool = False,
    ) -> str:
        """Save an alert with its watch's state and its deliveries; returns its id.

        ``recorded``: there will be a clip of it, whose address it gets. While the disk cannot be written, the alert
        waits in memory for ``flush``.
        """
        alert = f"alert_{uuid.uuid4().hex}"
        body = {**body, "clip": f"/v1/alerts/{alert}/clip" if recorded else None}
        row = (alert, watch, state, body, picture, tuple(targets))
        with self._lock:
            self._unwritten.append(row)
            with suppress(StoreError):
                self.flush()
        return alert

    def flush(self) -> None:
        """Write the alerts that could not be written; raises ``StoreError``."""
        with self._lock:
            while self._unwritten:
                self._write(*self._unwritten[0])
                self._unwritten.popleft()

    def _write(
        self,
        alert: str,
        watch: SavedWatch,
        state: dict[str, Any],
        body: dict[str, Any],
        picture: bytes | None,
        targets: tuple[dict[str, Any], ...],
    ) -> None:
        with Writing(self._db):
            known = self._db.execute("select stream from watches where id = ?", (watch.id,)).fetchone()
            if known is None:  # deleted in the meantime
                return
            row = (alert, watch.id, known[0], json.dumps(body), picture)
            cursor = self._db.execute(
                "insert into alerts (id, watch, stream, body, picture) values (?, ?, ?, ?, ?)", row
            )
            number = int(cursor.lastrowid or 0)
            self._db.execute("update watches set state = ? where id = ?", (json.dumps(state), watch.id))
            rows = [(number, json.dumps(target), 0) for target in targets]
            self._db.executemany("insert or replace into deliveries values (?, ?, ?)", rows)
            for table in ("alerts", "deliveries"):
                self._db.execute(f"delete from {table} where number <= ?", (number - KEPT_ALERTS,))
        self.newest = number

    def alerts(
        self,
        stream: str | None = None,
        limit: int = 50,
        before: str | None = None,
        after: int | None = None,
        watch: str | None = None,
    ) -> list[SavedAlert]:
        """The newest ``limit`` alerts before the one with the id ``before``, or the next ones ``after`` a number.

        Of one ``stream`` or ``watch``, or all. Oldest first.
        """
        conditions: list[tuple[str, Any]] = []
        if watch is not None:
            conditions.append(("watch = ?", watch))
        if stream is not None:
            conditions.append(("stream = ?", stream))
        if before is not None:
            conditions.append(("number < (select number from alerts where id = ?)", before))
        if after is not None:
            conditions.append(("number > ?", after))
        where = " and ".join(text for text, _ in conditions) or "1"
        order = "asc" if after is not None else "desc"
        rows = self._rows(
            f"select number, id, watch, stream, body from alerts where {where} order by number {order} limit ?",
            (*(value for _, value in conditions), limit),
        )
        return sorted((_alert(row) for row in rows), key=lambda alert: alert.number)

    def alert(self, alert: str) -> SavedAlert | None:
        """The alert with an id; None if there is none."""
        rows = self._rows("select number, id, watch, stream, body from alerts where id = ?", (alert,))
        return _alert(rows[0]) if rows else None

    def number_of(self, alert: str) -> int | None:
        """The number of the alert with an id; None if there is none."""
        rows = self._rows("select number from alerts where id = ?", (alert,))
        return int(rows[0][0]) if rows else None

    def picture(self, alert: str) -> bytes | None:
        """An alert's picture (JPEG); None if there is no such alert, or it has none."""
        rows = self._rows("select picture from alerts where id = ? and picture is not null", (alert,))
        return bytes(rows[0][0]) if rows else None

    # --- deliveries

    def deliveries(self, limit: int = 64, broker: str | None = None) -> list[Delivery]:
        """What is to be delivered to webhooks, or to a ``broker`` (its URL), oldest first."""
        condition, values = (_IS_WEBHOOK, ()) if broker is None else (f"{_URL} = ?", (broker,))
        return self._deliveries(f"{condition} order by d.number limit ?", (*values, limit))

    def next_deliveries(self, waiting: Collection[tuple[int, str]], busy: Collection[str]) -> list[Delivery]:
        """For each webhook's URL the oldest delivery, oldest first.

        Deliveries in ``waiting``, by number and URL, and URLs in ``busy`` are left out.
        """
        left_out = "select json_extract(value, '$[0]'), json_extract(value, '$[1]') from json_each(?)"
        oldest = (
            f"select min(d.number), d.target from deliveries d where {_IS_WEBHOOK}"
            f" and {_URL} not in (select value from json_each(?)) and (d.number, {_URL}) not in ({left_out})"
            f" group by {_URL}"
        )
        values = json.dumps(list(busy)), json.dumps(list(waiting))
        return self._deliveries(f"(d.number, d.target) in ({oldest}) order by d.number", values)

    def _deliveries(self, which: str, values: Sequence[Any]) -> list[Delivery]:
        rows = self._rows(
            "select a.number, a.id, a.watch, a.stream, a.body, a.picture, d.target, d.tries from deliveries d"
            f" join alerts a on a.number = d.number where {which}",
            values,
        )
        return [Delivery(_alert(row[:5]), json.loads(row[6]), row[7], row[5]) for row in rows]

    def tried(self, delivery: Delivery, done: bool) -> None:
        """Note that a delivery was tried once more; ``done``: it need not be tried again. Raises ``StoreError``."""
        key = (delivery.alert.number, json.dumps(delivery.target))
        with self._lock, Writing(self._db):
            if done:
                self._db.execute("delete from deliveries where number = ? and target = ?", key)
            else:
                self._db.execute("update deliveries set tries = tries + 1 where number = ? and target = ?", key)

    # --- what brokers retain

    def brokers(self) -> set[str]:
        """The URLs of brokers that there is something to deliver to, or that retain something of ours."""
        rows = self._rows(f"select broker from retained union select {_URL} from deliveries d where not {_IS_WEBHOOK}")
        return {url for (url,) in rows}

    def retained(self, broker: str) -> set[str]:
        """The topics that a broker may retain messages of."""
        return {topic for (topic,) in self._rows("select topic from retained where broker = ?", (broker,))}

    def note_retained(self, broker: str, added: Collection[str], removed: Collection[str]) -> None:
        """Note topics that a broker will retain, and others that it does not any more; raises ``StoreError``."""
        with self._lock, Writing(self._db):
            self._db.executemany("insert or ignore into retained values (?, ?)", [(broker, topic) for topic in added])
            rows = [(broker, topic) for topic in removed]
            self._db.executemany("delete from retained where broker = ? and topic = ?", rows)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return read_rows(self._db, query, values)

    def close(self) -> None:
        """Write what can be written, and close the database."""
        with self._lock:
            with suppress(StoreError):
                self.flush()
            self._db.close()


def new_watch_id() -> str:
    """An id for a watch that came without one."""
    return f"watch_{uuid.uuid4().hex[:12]}"


def _alert(row: Sequence[Any]) -> SavedAlert:
    number, alert, watch, stream, body = row
    return SavedAlert(number, alert, watch, stream, json.loads(body))
