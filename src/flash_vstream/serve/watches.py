"""Standing questions of a server: kept in the store, looked out for by the question worker, told as alerts."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flash_vstream.live.engine import Questions
from flash_vstream.live.messages import Report, Watch
from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.serve.alert_store import AlertStore, SavedAlert, SavedWatch, new_watch_id
from flash_vstream.serve.home_assistant import retained_messages
from flash_vstream.serve.mqtt import MOST_BROKERS, SCHEMES, Broker, Brokers
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.store import StoreError
from flash_vstream.serve.webhooks import Webhooks
from flash_vstream.video.addresses import hide_secrets, scheme_of
from flash_vstream.video.network import ForbiddenSourceError, parse_url

MOST_WATCHES = 64
FRAMES_UNSEEN = 3.0
"""An event's time keeps counting across at most this many missing frames in a row, or ten seconds if that is longer."""
RULE_FIELDS = ("when", "min_seconds", "cooldown_seconds", "threshold")
log = logging.getLogger("flash_vstream.serve")


class Watches:
    """The watches of all ``streams``. Those of other streams, which a full disk kept from being deleted, are deleted.

    ``place`` tells where a stream is now: the path of its shared state and its frame rate, or None while it is not
    watched. Watches wait for it then. ``is_live`` tells whether frames of it arrive, ``is_recorded`` whether they are
    kept.
    """

    def __init__(
        self,
        store: AlertStore,
        client: Questions,
        access: AccessRules,
        place: Callable[[str], tuple[str, float] | None],
        is_live: Callable[[str], bool],
        is_recorded: Callable[[str], bool],
        streams: Sequence[str],
    ):
        self.store, self._client, self._access = store, client, access
        self._place, self._is_live, self._is_recorded = place, is_live, is_recorded
        self._lock = threading.RLock()
        with suppress(StoreError):
            store.remove_other_streams(streams)
        self._watches = {watch.id: watch for watch in store.watches() if watch.stream in streams}
        self.alerts = 0
        self._newest: dict[str, tuple[int, SavedAlert | None, bytes | None]] = {}
        self.webhooks = Webhooks(store, access.rules)
        self.brokers = Brokers(store, access.rules, self._retained)
        self._follow_brokers()

    # --- what callers do

    def add(self, stream: str, spec: dict[str, Any], watch: str | None = None) -> dict[str, Any]:
        """Add a watch; raises ``ApiError`` if its id is taken, there are too many, or a target is forbidden."""
        self._check_targets(spec["targets"])
        with self._lock:
            self._check_brokers(spec["targets"])
            if watch in self._watches:
                raise ApiError(409, f"there is a watch called {watch!r} already; choose another id, or change that one")
            if len(self._watches) >= MOST_WATCHES:
                raise ApiError(429, f"there are {MOST_WATCHES} watches, the maximum; delete one first")
            saved = SavedWatch(watch or new_watch_id(), stream, time.time(), spec, {})
            self.store.put_watch(saved)
            self._watches[saved.id] = saved
            self._send(saved)
        self._follow_brokers()
        return self.get(stream, saved.id)

    def edit(self, stream: str, watch: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change a watch; it keeps its state unless its event changes. Raises ``ApiError``."""
        self._check_targets(changes.get("targets", ()))
        with self._lock:
            saved = self._get(stream, watch)
            self._check_brokers(changes.get("targets", ()))
            spec = saved.spec | changes
            state = saved.state if spec["event"] == saved.spec["event"] else {}
            if spec["paused"]:
                state = {**state, "phase": "away"}
            edited = replace(saved, spec=spec, state=state)
            self.store.put_watch(edited)
            self._watches[watch] = edited
            self._send(edited)
        self._follow_brokers()
        return self.get(stream, watch)

    def remove(self, stream: str, watch: str) -> None:
        """Delete a watch; raises ``ApiError`` if there is none."""
        with self._lock:
            self._get(stream, watch)
            self.store.remove_watch(watch)
            self._forget(watch)
        self._follow_brokers()

    def list(self, stream: str) -> "list[dict[str, Any]]":
        """A stream's watches, oldest first."""
        with self._lock:
            return [self._told(watch) for watch in self._watches.values() if watch.stream == stream]

    def get(self, stream: str, watch: str) -> dict[str, Any]:
        """One watch; raises ``ApiError`` if there is none."""
        with self._lock:
            return self._told(self._get(stream, watch))

    def _get(self, stream: str, watch: str) -> SavedWatch:
        saved = self._watches.get(watch)
        if saved is None or saved.stream != stream:
            raise ApiError(404, f"stream {stream!r} has no watch {watch[:80]!r}; see GET /v1/streams/{stream}/watches")
        return saved

    def _told(self, watch: SavedWatch) -> dict[str, Any]:
        """A watch as callers see it: its targets without their secrets."""
        state = watch.state
        targets = [self._told_target(target) for target in watch.spec["targets"]]
        status = {name: state.get(name) for name in ("phase", "time", "confidence", "error", "look_seconds")}
        counts = {name: state.get(name, 0) for name in ("events", "refused", "suppressed", "looks", "missed")}
        status["phase"] = "paused" if watch.spec["paused"] else status["phase"] or "away"
        newest, _ = self._newest_of(watch)
        status["newest_alert"] = newest.id if newest is not None else None
        return {"id": watch.id, "stream": watch.stream, **watch.spec, "targets": targets, **status, **counts}

    def _told_target(self, target: dict[str, Any]) -> dict[str, Any]:
        url = target["url"]
        error = self.brokers.error(url) if scheme_of(url) in SCHEMES else None
        return {"url": hide_secrets(url), "signed": bool(target.get("secret")), "error": error}

    def _check_targets(self, targets: Any) -> None:
        """Raise ``ApiError`` (403) for a target that the server's rules forbid, ``UserError`` for a malformed one."""
        rules = self._access.rules
        for target in targets:
            url, scheme = target["url"], scheme_of(target["url"])
            host = parse_url(url).hostname or ""
            if scheme in SCHEMES:
                Broker(url)
                if target.get("secret"):
                    raise ApiError(422, "a secret signs webhooks; put an MQTT broker's password in its URL")
            elif scheme not in ("http", "https"):
                raise ApiError(422, "a target's url must begin with http://, https://, mqtt:// or mqtts://")
            if rules is None:
                continue
            try:
                if scheme not in SCHEMES:
                    rules.check(url)
                elif host not in rules.hosts:  # an allowed host need not be up yet
                    rules.addresses(host)
            except ForbiddenSourceError as error:
                raise ApiError(403, str(error)) from None

    def _check_brokers(self, targets: Any) -> None:
        """Raise ``ApiError`` (429) if new targets need too many brokers."""
        new = {target["url"] for target in targets if scheme_of(target["url"]) in SCHEMES}
        if new - (known := self._brokers()) and len(new | known) > MOST_BROKERS:
            raise ApiError(429, f"watches name {MOST_BROKERS} MQTT brokers, the maximum")

    # --- what brokers are told

    def _brokers(self) -> set[str]:
        """The URLs of the brokers that watches name."""
        urls = (target["url"] for watch in self._watches.values() for target in watch.spec["targets"])
        return {url for url in urls if scheme_of(url) in SCHEMES}

    def _follow_brokers(self) -> None:
        with self._lock:
            urls = self._brokers()
        self.brokers.follow(urls)

    def _retained(self, url: str, prefix: str) -> dict[str, bytes]:
        """What the broker at ``url`` should retain, by topic."""
        with self._lock:
            told = [own for own in self._watches.values() if any(to["url"] == url for to in own.spec["targets"])]
            newest = [self._newest_of(watch) for watch in told]
        messages: dict[str, bytes] = {}
        for watch, (alert, picture) in zip(told, newest, strict=True):
            messages |= retained_messages(prefix, watch, self._is_live(watch.stream), alert, picture)
        return messages

    def _newest_of(self, watch: SavedWatch) -> tuple[SavedAlert | None, bytes | None]:
        """A watch's newest alert and its picture, looked up only if there are new alerts."""
        number = self.store.newest
        known = self._newest.get(watch.id)
        if known is None or known[0] != number:
            alert = next(iter(self.store.alerts(watch.stream, 1, watch=watch.id)), None)
            if known is None or known[1] is None or known[1] != alert:
                picture = self.store.picture(alert.id) if alert is not None else None
            else:
                picture = known[2]
            self._newest[watch.id] = number, alert, picture
        return self._newest[watch.id][1:]

    # --- what streams do

    def follow(self, stream: str) -> None:
        """Look out again where ``stream`` is now."""
        with self._lock:
            for watch in self._watches.values():
                if watch.stream == stream:
                    self._send(watch)

    def remove_stream(self, stream: str) -> None:
        """Delete a stream's watches and alerts; what cannot be deleted now is deleted at the next start."""
        with self._lock:
            with suppress(StoreError):
                self.store.remove_stream(stream)
            for watch in [own.id for own in self._watches.values() if own.stream == stream]:
                self._forget(watch)
        self._follow_brokers()

    def rename_stream(self, name: str, new_name: str) -> None:
        """Keep a stream's watches under its new name; raises ``StoreError``."""
        with self._lock:
            self.store.rename_stream(name, new_name)
            for watch in [own for own in self._watches.values() if own.stream == name]:
                self._watches[watch.id] = replace(watch, stream=new_name)

    def _forget(self, watch: str) -> None:
        del self._watches[watch]
        self._newest.pop(watch, None)
        self._client.drop_watch(watch)

    def _send(self, watch: SavedWatch) -> None:
        """Tell the question worker of a watch, or to forget it while it is paused or its stream is not watched."""
        place = self._place(watch.stream)
        if watch.spec["paused"] or place is None:
            self._client.drop_watch(watch.id)
            return
        path, fps = place
        fields = {name: watch.spec[name] for name in RULE_FIELDS}
        rule = WatchRule(**fields, longest_gap=max(10.0, FRAMES_UNSEEN / fps))
        self._client.set_watch(Watch(watch.id, path, watch.spec["event"], rule, watch.state))

    # --- what the question worker reports

    def take(self, report: Report) -> None:
        """Take what the question worker reports of a watch."""
        with self._lock:
            watch = self._watches.get(report.watch)
            if watch is None:
                return
            changed = watch.state.get("phase") != report.state.get("phase") or report.alert is not None
            watch = self._watches[watch.id] = replace(watch, state=report.state)
            if report.alert is not None:
                self.alerts += 1
                body = {"event": watch.spec["event"], "when": watch.spec["when"], **report.alert.to_dict()}
                recorded = self._is_recorded(watch.stream)
                picture, targets = report.alert.picture, watch.spec["targets"]
                self.store.add_alert(watch, report.state, body, picture, targets, recorded)
        if report.alert is not None:
            self.webhooks.wake()
        if changed:
            self.brokers.wake()

    def save(self) -> None:
        """Save every watch's state, and the alerts that could not be saved; raises ``StoreError``."""
        self._follow_brokers()  # some may have nothing to hear of any more
        with self._lock:
            self.store.flush()
            self.store.put_states({watch.id: watch.state for watch in self._watches.values()})

    def close(self) -> None:
        """Stop delivering and close the store; what is not delivered yet is delivered by the next server."""
        self.webhooks.close()
        self.brokers.close()
        self.store.close()
