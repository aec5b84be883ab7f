"""What MQTT brokers retain of watches: their state and newest alert, and how Home Assistant finds both.

Topics are ``PREFIX/STREAM/WATCH/…``; ``PREFIX/status`` says whether the server is there.
"""

import json
import re
from typing import Any

from flash_vstream import __version__
from flash_vstream.serve.alert_store import SavedAlert, SavedWatch

DISCOVERY = "homeassistant"
"""The prefix under which Home Assistant looks for devices, unless it was told another."""


def topic_of(prefix: str, stream: str, watch: str, what: str) -> str:
    """The topic of something about a watch: ``state``, ``availability``, ``alert``, ``last_alert`` or ``picture``."""
    return f"{prefix}/{stream}/{watch}/{what}"


def retained_messages(
    prefix: str, watch: SavedWatch, is_live: bool, alert: SavedAlert | None, picture: bytes | None
) -> dict[str, bytes]:
    """The retained messages of a watch with its newest ``alert``, by topic."""

    def topic(what: str) -> str:
        return topic_of(prefix, watch.stream, watch.id, what)

    available = is_live and not watch.spec["paused"]
    messages = {
        topic("availability"): b"online" if available else b"offline",
        topic("state"): b"ON" if watch.state.get("phase") == "there" else b"OFF",
    }
    if alert is not None:
        messages[topic("last_alert")] = json.dumps(alert.to_dict()).encode()
    if picture is not None:
        messages[topic("picture")] = picture
    sensor = {"state_topic": topic("state"), "json_attributes_topic": topic("last_alert")}
    image = {"image_topic": topic("picture"), "content_type": "image/jpeg"}
    shown = " ".join(watch.spec["event"].split())[:80]
    both: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("binary_sensor", shown, sensor),
        ("image", f"{shown} (picture)", image),
    )
    for kind, name, fields in both:
        address = f"{DISCOVERY}/{kind}/{_id(prefix)}/{_id(watch.id)}/config"
        messages[address] = json.dumps(_entity(prefix, watch, name, kind) | fields).encode()
    return messages


def _entity(prefix: str, watch: SavedWatch, name: str, kind: str) -> dict[str, Any]:
    """An entity of the device that a stream is."""
    available = [{"topic": f"{prefix}/status"}, {"topic": topic_of(prefix, watch.stream, watch.id, "availability")}]
    return {
        "name": name,
        "unique_id": f"{_id(prefix)}_{_id(watch.id)}_{kind}",
        "availability": available,
        "availability_mode": "all",
        "device": {
            "identifiers": [f"{_id(prefix)}_{_id(watch.stream)}"],
            "name": watch.stream,
            "model": "Video stream",
        },
        "origin": {"name": "flash-vstream", "sw_version": __version__},
    }


def _id(name: str) -> str:
    """A name of the letters, digits, ``_`` and ``-`` that Home Assistant allows; different names stay different."""
    return re.sub(r"[^A-Za-z0-9-]", lambda match: f"_{ord(match[0]):x}_", name)
