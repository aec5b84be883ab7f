"""A real MQTT broker, and a subscriber to it."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from helpers.environment import missing
from helpers.waiting import until


class Mosquitto:
    """A broker on a port of its own, which can be killed and started again.

    ``options`` are lines of its configuration. Without persistence, it forgets what it retained when it is killed.
    """

    def __init__(self, folder: Path, *options: str):
        program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
        if program is None:
            missing("mosquitto")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._settings = folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "user root", *options]
        self._settings.write_text("\n".join(lines) + "\n")
        self._command = [program, "-c", str(self._settings)]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._listens)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Subscriber:
    """What arrives at a broker: ``messages`` as (topic, payload), in order; ``retained``, the newest by topic.

    Alerts themselves are not retained.
    """

    def __init__(self, client: Client):
        self.messages: list[tuple[str, bytes]] = []
        self.retained: dict[str, bytes] = {}
        self.is_ready = False
        client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        client.on_subscribe = self._ready
        client.on_message = self._take

    def _ready(self, *_: object) -> None:
        self.is_ready = True

    def _take(self, _: object, __: object, message) -> None:
        self.messages.append((message.topic, message.payload))
        if message.topic.endswith("/alert"):
            return
        if message.payload:
            self.retained[message.topic] = message.payload
        else:
            self.retained.pop(message.topic, None)

    def at(self, topic: str) -> list[bytes]:
        """The payloads that came at a topic."""
        return [payload for name, payload in self.messages if name == topic]


@contextmanager
def subscribed(
    broker: Mosquitto, login: tuple[str, str] | None = None, name: str | None = None
) -> Iterator[Subscriber]:
    """Subscribe to everything; the connection is made again whenever it breaks.

    For a subscriber with a ``name``, the broker keeps what it misses.
    """
    client = Client(CallbackAPIVersion.VERSION2, client_id=name or "", clean_session=name is None)
    client.reconnect_delay_set(0.05, 0.05)
    if login is not None:
        client.username_pw_set(*login)
    subscriber = Subscriber(client)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    until(lambda: subscriber.is_ready)
    try:
        yield subscriber
    finally:
        client.disconnect()
        client.loop_stop()


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Mosquitto]:
    """Run a broker; it is killed at the end."""
    broker = Mosquitto(folder, *options)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()
