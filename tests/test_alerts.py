"""Alerts are kept and delivered at least once; the question worker is replaced by reports."""

import base64
import hashlib
import hmac
import socket
import sqlite3
import threading
from contextlib import ExitStack, contextmanager

import pytest

from flash_vstream.errors import UserError
from flash_vstream.serve import alert_store, webhooks
from flash_vstream.serve.schemas import WatchEdit
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.store import StoreError
from flash_vstream.serve.watch_api import _following
from flash_vstream.video.gateway import pinned_request
from helpers.asynchronous import run_async
from helpers.waiting import until
from helpers.web import raw_camera
from helpers.webhooks import receiving


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(webhooks, "RETRY_SECONDS", (0.01, 0.05))


def test_a_webhook_is_signed_and_repeated_until_it_is_taken(open_server):
    server = open_server()
    with receiving() as receiver:
        receiver.statuses = [500, 302, 503]
        told = server.add(targets=[{"url": receiver.url, "secret": "hush"}])
        assert told["targets"] == [{"url": receiver.url, "signed": True, "error": None}]
        server.report()
        until(lambda: not server.store.deliveries())
    assert len(receiver.requests) == 4
    (alert,) = server.store.alerts("door")
    expected = {"id": alert.id, "watch": "dog", "stream": "door", "event": "a dog", "when": "starts", "state": "start"}
    expected |= {"began": 5.0, "time": 7.0, "clock": 1.7e9, "confidence": 0.9, "confirmation": 0.8}
    expected |= {"sentence": "A dog runs.", "evidence": [6.0, 7.0], "clip": None}
    expected |= {"picture": "data:image/jpeg;base64,anBlZw=="}
    assert receiver.alerts() == [expected] * 4
    for headers, body in receiver.requests:
        assert headers["webhook-id"] == alert.id
        signed = f"{alert.id}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.new(b"hush", signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert server.watches.webhooks.failed == 3


def test_a_target_that_is_down_delays_no_other(open_server):
    server = open_server()
    with receiving() as receiver:
        server.add(targets=[{"url": "http://127.0.0.1:1/"}, {"url": receiver.url}])
        for time in (7.0, 70.0, 700.0):
            server.report(time=time)
        until(lambda: len(receiver.requests) == 3)
        until(lambda: [own.target["url"] for own in server.store.deliveries()] == ["http://127.0.0.1:1/"] * 3)
        assert "webhook-signature" not in receiver.requests[0][0]


@contextmanager
def hanging():
    """A target that takes connections and never answers; yields its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_target_that_hangs_with_many_alerts_delays_no_other(open_server):
    server = open_server()
    with receiving() as receiver, hanging() as url:
        server.add(targets=[{"url": url}])
        server.add("yard", "cat", targets=[{"url": receiver.url}])
        for time in range(70):
            server.report(time=float(time))
        server.report("cat")
        until(lambda: receiver.requests, 30)
        server.watches.close()


def test_many_targets_that_hang_delay_no_other(open_server, monkeypatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 0.5)
    server = open_server()
    with receiving() as receiver, ExitStack() as targets:
        urls = [targets.enter_context(hanging()) for _ in range(webhooks.AT_ONCE + 2)]
        server.add(targets=[{"url": url} for url in urls])
        server.add("yard", "cat", targets=[{"url": receiver.url}])
        for time in range(10):
            server.report(time=float(time))
        server.report("cat")
        until(lambda: receiver.requests, 30)
        server.watches.close()


def test_a_call_has_one_deadline_and_ends_with_the_server(open_server, monkeypatch):
    """A target that sends a byte now and then never exceeds a limit on each read."""
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 0.3)
    server = open_server()
    with raw_camera(b"HTTP/1.1 200 OK\r\n", lambda _: b"x: 1\r\n") as url:
        server.add(targets=[{"url": url}])
        server.report()
        until(lambda: server.watches.webhooks.failed, 30)
        monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 600)
        until(lambda: server.watches.webhooks._busy, 30)
        closing = threading.Thread(target=server.watches.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()
    assert open_server().store.deliveries()


def test_an_unexpected_error_is_a_failed_try(open_server, monkeypatch):
    errors = [KeyError("odd")]

    def pinned(*arguments):
        if errors:
            raise errors.pop()
        return pinned_request(*arguments)

    monkeypatch.setattr(webhooks, "pinned_request", pinned)
    server = open_server()
    with receiving() as receiver:
        server.add(targets=[{"url": receiver.url}])
        server.report()
        until(lambda: receiver.requests, 30)
    assert server.watches.webhooks.failed == 1


def test_the_oldest_delivery_to_each_target_comes_next(open_server):
    server = open_server()
    server.watches.webhooks.close()
    server.add(targets=[{"url": "http://a.test/"}, {"url": "http://b.test/"}, {"url": "mqtt://c.test"}])
    for time in (1.0, 2.0, 3.0):
        server.report(time=time)

    def coming(waiting=(), busy=()):
        found = server.store.next_deliveries(waiting, busy)
        return [(own.alert.body["time"], own.target["url"]) for own in found]

    assert coming() == [(1, "http://a.test/"), (1, "http://b.test/")]
    waiting = [(1, "http://a.test/"), (2, "http://a.test/")]
    assert coming(waiting) == [(1, "http://b.test/"), (3, "http://a.test/")]
    assert coming(waiting, {"http://b.test/"}) == [(3, "http://a.test/")]


def test_a_target_is_given_up_after_many_tries(open_server, monkeypatch):
    monkeypatch.setattr(webhooks, "MOST_TRIES", 3)
    server = open_server()
    server.add(targets=[{"url": "http://127.0.0.1:1/"}])
    server.report()
    until(lambda: server.watches.webhooks.given_up == 1)
    until(lambda: not server.store.deliveries())
    assert server.watches.webhooks.failed == 3


def test_a_killed_server_loses_no_watch_and_no_alert(open_server):
    killed = open_server()
    killed.add(targets=[{"url": "http://127.0.0.1:1/"}], min_seconds=0)
    killed.add("yard", "cat", paused=True)
    killed.report()
    killed.watches.webhooks.close()
    with receiving() as receiver:
        killed.store._db.execute("update deliveries set target = ?", (f'{{"url": "{receiver.url}"}}',))
        killed.store._db.commit()
        after = open_server()  # the first was never closed
        until(lambda: receiver.requests)
    assert receiver.alerts()[0]["id"] == after.store.alerts()[0].id
    assert {watch: told.shared_path for watch, told in after.client.watches.items()} == {}
    after.watches.follow("door")  # its stream is watched again
    after.watches.follow("yard")
    (watch,) = after.client.watches.values()
    assert (watch.shared_path, watch.rule.min_seconds, watch.rule.longest_gap) == ("/state/1", 0, 10)
    assert (watch.state["phase"], watch.state["events"], watch.state["looks"]) == ("there", 1, 8)
    assert [told["phase"] for told in after.watches.list("yard")] == ["paused"]


def test_watches_are_changed_paused_and_deleted(open_server):
    server = open_server()
    server.add("yard", "cat")
    assert server.client.watches["cat"].rule.longest_gap == 30  # a frame every ten seconds
    server.report("cat")

    def edit(**changes):
        return server.watches.edit("yard", "cat", WatchEdit(**changes).model_dump(exclude_unset=True))

    assert edit(min_seconds=9)["events"] == 1
    assert server.client.watches["cat"].rule.min_seconds == 9
    assert edit(paused=True)["phase"] == "paused"
    assert "cat" not in server.client.watches
    assert edit(paused=False)["phase"] == "away"
    assert edit(event="a cat")["events"] == 0
    with pytest.raises(ApiError, match="already"):
        server.add("yard", "cat")
    with pytest.raises(ApiError, match="no watch"):
        server.watches.get("door", "cat")
    server.watches.remove("yard", "cat")
    server.report("cat")  # on its way when the watch was deleted
    assert (server.client.watches, len(server.store.alerts("yard"))) == ({}, 1)


def test_watches_go_with_their_stream(open_server):
    server = open_server()
    server.add()
    server.add("yard", "cat")
    server.report("cat")
    server.places["gate"] = ("/state/3", 1.0)
    server.watches.rename_stream("yard", "gate")
    server.watches.follow("gate")
    assert server.client.watches["cat"].shared_path == "/state/3"
    assert [alert.stream for alert in server.store.alerts("gate")] == ["gate"]
    server.watches.remove_stream("gate")
    assert (server.watches.list("gate"), server.store.alerts("gate")) == ([], [])
    assert [watch.id for watch in open_server(streams=("yard",)).store.watches()] == []  # "door" is gone


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/", "http://[::1]:80/", "http://10.0.0.1/", "http://169.254.169.254/"]
)
def test_targets_obey_the_rules_for_addresses(open_server, url):
    server = open_server(access=AccessRules("0.0.0.0", "token", hosts=frozenset({"hooks.test"})))
    with pytest.raises(ApiError) as refused:
        server.add(targets=[{"url": url}])
    assert refused.value.status == 403
    server.add(targets=[{"url": "http://hooks.test/"}])
    with pytest.raises(ApiError, match="private"):
        server.watches.edit("door", "dog", {"targets": [{"url": url}]})
    with pytest.raises(ApiError, match="http"):
        server.watches.edit("door", "dog", {"targets": [{"url": "rtsp://hooks.test/"}]})


def test_a_target_whose_name_leads_elsewhere_later_is_not_called(open_server):
    server = open_server()
    with receiving() as receiver:
        server.add(targets=[{"url": receiver.url}])
        server.watches.webhooks.close()
        server.report()
        guarded = open_server(access=AccessRules("0.0.0.0", "token"))
        until(lambda: guarded.watches.webhooks.failed > 0)
        assert receiver.requests == []


def test_an_alert_on_a_full_disk_is_written_later(open_server):
    server = open_server()
    server.add()
    server.store._db.execute("pragma query_only = on")
    server.report()
    assert server.store.alerts() == []
    server.store._db.execute("pragma query_only = off")
    server.watches.save()
    assert [alert.body["time"] for alert in server.store.alerts()] == [7.0]


def test_the_newest_alerts_are_kept_and_found_by_id(open_server, monkeypatch):
    monkeypatch.setattr(alert_store, "KEPT_ALERTS", 5)
    server = open_server()
    server.add(targets=[{"url": "http://127.0.0.1:1/"}])
    for time in range(8):
        server.report(time=float(time))
    kept = server.store.alerts()
    assert [alert.body["time"] for alert in kept] == [3, 4, 5, 6, 7]
    assert [alert.body["time"] for alert in server.store.alerts(before=kept[2].id, limit=1)] == [4]
    after = server.store.number_of(kept[1].id)
    assert [alert.body["time"] for alert in server.store.alerts("door", 2, after=after)] == [5, 6]
    assert (server.store.picture(kept[0].id), server.store.picture("none")) == (b"jpeg", None)
    assert len(server.store.deliveries()) <= 5


def test_a_damaged_watch_stops_no_other(open_server, tmp_path):
    server = open_server()
    server.add()
    with sqlite3.connect(tmp_path / "alerts.sqlite") as db:
        db.execute("insert into watches values ('bad', 'door', 0, '{', '{}')")
    db.close()
    assert [watch.id for watch in open_server().store.watches()] == ["dog"]


def test_a_database_that_cannot_be_read_any_more_is_told(open_server):
    server = open_server()
    server.watches.webhooks.close()
    store = server.store
    for table in ("watches", "alerts", "deliveries", "retained"):
        store._db.execute(f"drop table {table}")
    for read in (
        store.watches,
        store.alerts,
        lambda: store.alert("a"),
        lambda: store.number_of("a"),
        lambda: store.picture("a"),
        store.deliveries,
        store.brokers,
        lambda: store.retained("mqtt://c.test"),
    ):
        with pytest.raises(UserError, match="cannot be read"):
            read()
    with pytest.raises(StoreError):
        store.remove_other_streams(())
    server.watches.brokers.follow(set())
    store.newest = 1

    async def followed() -> list[dict[str, str]]:
        return [event async for event in _following("alert", store, store.alerts, 0, "number", lambda: False)]

    assert run_async(followed) == []  # ends, so that callers come back
