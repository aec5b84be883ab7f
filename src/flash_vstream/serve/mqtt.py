"""Alerts and watches' states at MQTT brokers: alerts at least once, states retained, and a last will.

Each broker has a thread with one connection at a time. Nothing waits in the MQTT client: alerts stay in the store until
the broker has acknowledged them, and what it retains is compared with what it should retain, anew for each connection.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from flash_vstream.backoff import backoff_seconds
from flash_vstream.errors import UserError
from flash_vstream.serve.alert_store import AlertStore
from flash_vstream.serve.home_assistant import topic_of
from flash_vstream.serve.store import StoreError
from flash_vstream.video.gateway import tls_context
from flash_vstream.video.network import SourceRules, parse_url

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessageInfo

SCHEMES = {"mqtt": 1883, "mqtts": 8883}
PREFIX = "flash-vstream"
MOST_BROKERS = 8
ACKNOWLEDGE_SECONDS = 10.0
"""How long a broker may take to accept a connection or a message."""
KEEPALIVE_SECONDS = 15
"""How often a broker hears from us; after one and a half times this, it publishes the last will."""
RETRY_SECONDS = (1.0, 60.0)
"""The shortest and longest delay between connections; it doubles each time, with jitter."""
POLL_SECONDS = 1.0
NOT_YET = "not connected yet"
log = logging.getLogger("flash_vstream.serve")

Retained = Callable[[str, str], Mapping[str, bytes]]
"""What a broker (its URL) should retain under a prefix, by topic."""


@dataclass(frozen=True)
class Broker:
    """A broker as its URL names it: ``mqtt[s]://[USER[:PASSWORD]@]HOST[:PORT][/PREFIX]``.

    Raises ``UserError`` for a malformed URL, and if MQTT is not installed.
    """

    url: str
    host: str = field(init=False)
    port: int = field(init=False)
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        parts = parse_url(self.url)
        scheme, prefix = parts.scheme.lower(), unquote(parts.path.strip("/")) or PREFIX
        if parts.query or parts.fragment:
            raise UserError("an MQTT URL has no ? and no # (write them in a password as %3F and %23)")
        if any(character in prefix for character in "+#$\0") or len(prefix.encode()) > 200:
            raise UserError("the path of an MQTT URL begins the topics; it must be short, without +, # and $")
        if find_spec("paho") is None:
            raise UserError("MQTT needs an extra package: pip install 'flash-vstream[mqtt]'")
        for name, value in (("host", parts.hostname), ("port", parts.port or SCHEMES[scheme]), ("prefix", prefix)):
            object.__setattr__(self, name, value)

    @property
    def login(self) -> tuple[str, str | None] | None:
        """User and password; None without."""
        parts = parse_url(self.url)
        if parts.username is None:
            return None
        return unquote(parts.username), None if parts.password is None else unquote(parts.password)

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS is asked for."""
        return self.url[:5].lower() == "mqtts"


class _LostError(Exception):
    """The connection broke, or the broker did not acknowledge in time."""


class _Connection:
    """Keeps one broker up to date, in a thread of its own, until closed."""

    def __init__(self, broker: Broker, store: AlertStore, rules: SourceRules | None, retained: Retained):
        self._broker, self._store, self._rules, self._retained = broker, store, rules, retained
        self.failures = 0
        self.error: str | None = NOT_YET
        self._shown: dict[str, bytes] = {}  # what the broker has acknowledged over this connection
        self._stopping, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for news now."""
        self._news.set()

    def _run(self) -> None:
        failures = 0  # in a row
        while not self._stopping.is_set():
            try:
                with self._connected() as client:
                    self.error, failures = None, 0
                    while not self._stopping.is_set():
                        self._bring_up_to_date(client)
                        self._news.wait(POLL_SECONDS)
                        self._news.clear()
            except Exception as error:  # of any kind: this thread must survive, and the next try may succeed
                reason = (
                    f"{self._broker.host}: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}"
                )
                self.failures += 1
                if self.error != reason:
                    log.warning("an MQTT broker cannot be used", extra={"reason": reason})
                self.error = reason
            failures += 1
            self._stopping.wait(backoff_seconds(failures, *RETRY_SECONDS))

    @contextmanager
    def _connected(self) -> "Iterator[Client]":
        """Context of a connection that the broker has accepted; leaves a farewell, or the last will."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client, broker = Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False), self._broker
        status = f"{broker.prefix}/status"
        answered, answers = threading.Event(), []

        def on_connect(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            answers.append(reason)
            answered.set()

        client.on_connect = on_connect
        client.connect_timeout = ACKNOWLEDGE_SECONDS
        client.will_set(status, b"offline", qos=1, retain=True)
        if broker.login is not None:
            client.username_pw_set(*broker.login)
        host = self._rules.addresses(broker.host, broker.port)[0] if self._rules is not None else broker.host
        if broker.is_encrypted:
            client.tls_set_context(tls_context(broker.host))
        client.connect(host, broker.port, KEEPALIVE_SECONDS)
        client.loop_start()
        try:
            if not answered.wait(ACKNOWLEDGE_SECONDS):
                raise _LostError("the broker does not answer")
            if answers[0].is_failure:
                raise _LostError(f"the broker refuses the connection: {answers[0]}")
            self._shown.clear()
            yield client
            with suppress(_LostError):
                if self._shown:
                    _await(client, [client.publish(status, b"offline", qos=1, retain=True)])
        finally:
            client.disconnect()
            client.loop_stop()

    def _bring_up_to_date(self, client: "Client") -> None:
        """Publish what has changed, then the alerts; raises ``_LostError``."""
        self._publish_retained(client)
        for delivery in self._store.deliveries(broker=self._broker.url):
            alert = delivery.alert
            topic = topic_of(self._broker.prefix, alert.stream, alert.watch, "alert")
            _await(client, [client.publish(topic, json.dumps(alert.to_dict()), qos=1)])
            with suppress(StoreError):  # then it is published again later: at least once
                self._store.tried(delivery, done=True)
        if not client.is_connected():
            raise _LostError("the connection broke")

    def _publish_retained(self, client: "Client") -> None:
        """Publish the retained messages that differ from those of this connection; clear those of the past."""
        url, prefix = self._broker.url, self._broker.prefix
        wanted = dict(self._retained(url, prefix))
        if wanted:
            wanted[f"{prefix}/status"] = b"online"
        known = self._store.retained(url)
        past = known - wanted.keys()
        self._store.note_retained(url, wanted.keys() - known, ())
        changed = {topic: payload for topic, payload in wanted.items() if self._shown.get(topic) != payload}
        messages = changed | dict.fromkeys(past, b"")  # an empty message clears a retained one
        _await(client, [client.publish(topic, payload, qos=1, retain=True) for topic, payload in messages.items()])
        self._shown = wanted
        if past:
            self._store.note_retained(url, (), past)

    def stop(self) -> None:
        """Start to publish ``offline`` and disconnect."""
        self._stopping.set()
        self._news.set()

    def join(self) -> None:
        """Wait until it has stopped, unless the broker hangs."""
        self._thread.join(timeout=ACKNOWLEDGE_SECONDS)


def _await(client: "Client", messages: "Sequence[MQTTMessageInfo]") -> None:
    """Wait until the broker has acknowledged messages; raises ``_LostError``."""
    deadline = time.monotonic() + ACKNOWLEDGE_SECONDS
    for message in messages:
        if message.rc != 0:
            raise _LostError("the connection broke")
        while not message.is_published():
            message.wait_for_publish(0.1)
            if not client.is_connected():
                raise _LostError("the connection broke")
            if time.monotonic() > deadline:
                raise _LostError("the broker does not acknowledge messages")


class Brokers:
    """Connections to all brokers that watches name, or that still have to hear of something.

    Its threads call ``retained``, so nothing that it waits for may be held while these methods are called.
    """

    def __init__(self, store: AlertStore, rules: SourceRules | None, retained: Retained):
        self._store, self._rules, self._retained = store, rules, retained
        self._connections: dict[str, _Connection] = {}
        self._lock = threading.Lock()

    @property
    def failures(self) -> int:
        """How many connections failed or broke."""
        return sum(connection.failures for connection in list(self._connections.values()))

    def error(self, url: str) -> str | None:
        """Why a broker is not reached; None if it is."""
        connection = self._connections.get(url)
        return connection.error if connection is not None else NOT_YET

    def follow(self, urls: set[str]) -> None:
        """Connect to the brokers at ``urls`` and those with a past, disconnect from others, and look for news now."""
        with self._lock:
            try:
                past = self._store.brokers()
            except UserError:  # logged, and looked up again at the next save
                past = set(self._connections)
            needed = urls | past
            for url in self._connections.keys() - needed:
                self._connections.pop(url).stop()
            for url in needed - self._connections.keys():
                with suppress(UserError):  # of a past in which MQTT was installed
                    self._connections[url] = _Connection(Broker(url), self._store, self._rules, self._retained)
        self.wake()

    def wake(self) -> None:
        """Look for news now."""
        for connection in list(self._connections.values()):
            connection.wake()

    def close(self) -> None:
        """Disconnect from all."""
        with self._lock:
            for connection in self._connections.values():
                connection.stop()
            for connection in self._connections.values():
                connection.join()
