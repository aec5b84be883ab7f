"""Alerts and states at a real MQTT broker, Debian's mosquitto."""

import json
import subprocess
import sys

import pytest
import trustme

from flash_vstream.serve import mqtt
from flash_vstream.serve.security import AccessRules, ApiError
from helpers.mqtt import running, subscribed
from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until

ANYONE = "allow_anonymous true"
BASE = "flash-vstream/door/dog"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(mqtt, "RETRY_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(mqtt, "POLL_SECONDS", 0.05)


def url_of(broker, login="", prefix=""):
    return f"mqtt://{login}127.0.0.1:{broker.port}{prefix}"


def test_a_broker_is_told_of_alerts_and_retains_the_state(open_server, tmp_path):
    with running(tmp_path, ANYONE) as broker:
        server = open_server()
        server.add(targets=[{"url": url_of(broker)}])
        with subscribed(broker) as before:
            until(lambda: before.retained.get(f"{BASE}/state") == b"OFF")
            assert before.retained["flash-vstream/status"] == b"online"
            assert before.retained[f"{BASE}/availability"] == b"online"
            assert f"{BASE}/picture" not in before.retained
            server.report()
            until(lambda: before.at(f"{BASE}/alert"))
            (alert,) = server.store.alerts()
            assert [json.loads(payload) for payload in before.at(f"{BASE}/alert")] == [alert.to_dict()]
            # whoever hears of an alert finds its picture there
            topics = [topic for topic, _ in before.messages]
            assert topics.index(f"{BASE}/picture") < topics.index(f"{BASE}/alert")
        until(lambda: not server.store.deliveries(broker=url_of(broker)))
        with subscribed(broker) as after:
            until(lambda: after.retained.get(f"{BASE}/picture") == b"jpeg")
            assert after.retained[f"{BASE}/state"] == b"ON"
            assert json.loads(after.retained[f"{BASE}/last_alert"])["id"] == alert.id
            assert after.at(f"{BASE}/alert") == []  # an alert is not told again to whoever comes later
            server.live.clear()  # the camera is away
            until(lambda: after.retained[f"{BASE}/availability"] == b"offline")
            server.watches.edit("door", "dog", {"paused": True})
            server.live.add("door")
            server.report(kind="end", phase="away", time=9.0)
            until(lambda: after.retained[f"{BASE}/state"] == b"OFF")
            assert after.retained[f"{BASE}/availability"] == b"offline"
        (told,) = server.watches.list("door")
        assert told["targets"][0]["error"] is None


def test_home_assistant_finds_a_sensor_and_an_image(open_server, tmp_path):
    with running(tmp_path, ANYONE) as broker, subscribed(broker) as seen:
        server = open_server()
        server.add("yard", "my.cat", targets=[{"url": url_of(broker, prefix="/home/garden")}])
        sensor_at, image_at = (
            f"homeassistant/{kind}/home_2f_garden/my_2e_cat/config" for kind in ("binary_sensor", "image")
        )
        until(lambda: {sensor_at, image_at} <= seen.retained.keys())
        sensor, image = json.loads(seen.retained[sensor_at]), json.loads(seen.retained[image_at])
        assert sensor["name"] == "a dog"
        assert sensor["state_topic"] == "home/garden/yard/my.cat/state"
        assert sensor["json_attributes_topic"] == "home/garden/yard/my.cat/last_alert"
        assert image["image_topic"] == "home/garden/yard/my.cat/picture"
        assert sensor["unique_id"] != image["unique_id"]
        assert sensor["device"] == image["device"] == sensor["device"] | {"name": "yard"}
        topics = [one["topic"] for one in sensor["availability"]]
        assert topics == ["home/garden/status", "home/garden/yard/my.cat/availability"]
        assert seen.retained["home/garden/yard/my.cat/availability"] == b"offline"  # "yard" is not live

        server.watches.rename_stream("yard", "gate")
        until(lambda: json.loads(seen.retained[sensor_at])["device"]["name"] == "gate")
        until(lambda: not any("/yard/" in topic for topic in seen.retained))
        server.watches.remove("gate", "my.cat")
        until(lambda: not seen.retained)  # nothing is left of it
        until(lambda: server.watches.save() or not server.watches.brokers._connections)


def test_a_broker_that_is_killed_misses_no_alert(open_server, tmp_path):
    disk = ("persistence true", f"persistence_location {tmp_path}/", "autosave_interval 1", "autosave_on_changes true")
    with running(tmp_path, ANYONE, *disk) as broker:
        server = open_server()
        server.add(targets=[{"url": url_of(broker)}])
        with subscribed(broker, name="listener") as seen:  # the broker keeps for it what it misses
            server.report(time=1.0)
            until(lambda: seen.at(f"{BASE}/alert"))
            until((tmp_path / "mosquitto.db").exists)
            broker.kill()
            for time in (2.0, 3.0):
                server.report(time=time)
            until(lambda: server.watches.list("door")[0]["targets"][0]["error"] not in (None, mqtt.NOT_YET))
            broker.start()
            until(lambda: len({json.loads(payload)["id"] for payload in seen.at(f"{BASE}/alert")}) == 3)
        until(lambda: not server.store.deliveries(broker=url_of(broker)))
    expected = {alert.id: alert.to_dict() for alert in server.store.alerts()}
    assert {told["id"]: told for told in map(json.loads, seen.at(f"{BASE}/alert"))} == expected


def test_a_broker_that_forgets_is_told_again(open_server, tmp_path):
    with running(tmp_path, ANYONE) as broker:
        server = open_server()
        server.add(targets=[{"url": url_of(broker)}])
        server.report(time=3.0)
        with subscribed(broker) as seen:
            until(lambda: len(seen.retained) == 7)
            known = seen.retained.copy()
            seen.retained.clear()
            broker.kill()
            broker.start()
            until(lambda: seen.retained == known)


def test_what_a_past_server_left_is_cleared_and_delivered(open_server, tmp_path):
    with running(tmp_path, ANYONE) as broker, subscribed(broker) as seen:
        before = open_server()
        before.add(targets=[{"url": url_of(broker)}])
        before.add("yard", "cat", targets=[{"url": url_of(broker)}])
        until(lambda: "flash-vstream/yard/cat/state" in seen.retained)
        before.watches.brokers.close()
        until(lambda: seen.retained["flash-vstream/status"] == b"offline")
        before.report()
        open_server(streams=("door",))  # "yard" was deleted in the meantime
        until(lambda: seen.at(f"{BASE}/alert"))
        until(lambda: not any("cat" in topic for topic in seen.retained))
        assert seen.retained["flash-vstream/status"] == b"online"


def test_logins_are_used_and_hidden(open_server, tmp_path):
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "camera", "pa/ss"], check=True)
    with running(tmp_path, "allow_anonymous false", f"password_file {passwords}") as broker:
        server = open_server()
        server.add(targets=[{"url": url_of(broker, "camera:wrong@")}])
        until(lambda: "refuses" in (server.watches.list("door")[0]["targets"][0]["error"] or ""))
        right = url_of(broker, "camera:pa%2Fss@")
        told = server.watches.edit("door", "dog", {"targets": [{"url": right}]})
        assert told["targets"][0]["url"] == url_of(broker)
        with subscribed(broker, ("camera", "pa/ss")) as seen:
            until(lambda: f"{BASE}/state" in seen.retained)


def test_certificates_are_verified(open_server, tmp_path, monkeypatch):
    authority = trustme.CA()
    issued = authority.issue_cert("broker.test")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = [f"certfile {tmp_path / 'cert.pem'}", f"keyfile {tmp_path / 'key.pem'}", ANYONE]
    with running(tmp_path, *options) as broker:
        rules = AccessRules("0.0.0.0", "token", hosts=frozenset({"broker.test"}))
        server = open_server(access=rules)
        monkeypatch.setattr(type(rules.rules), "addresses", lambda *_: ["127.0.0.1"])
        server.add(targets=[{"url": f"mqtts://broker.test:{broker.port}"}])

        def error():
            return server.watches.list("door")[0]["targets"][0]["error"]

        until(lambda: "CERTIFICATE_VERIFY_FAILED" in (error() or ""))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        until(lambda: error() is None)
        server.add(watch="cat", targets=[{"url": f"mqtts://other.test:{broker.port}"}])
        told = until(
            lambda: (all_ := server.watches.list("door")) and all_[1]["targets"][0]["error"] != mqtt.NOT_YET and all_
        )
        assert "other.test" in told[1]["targets"][0]["error"]


@pytest.mark.parametrize(
    ("url", "status"),
    [("mqtt://127.0.0.1", 403), ("mqtt://10.0.0.1/x", 403), ("mqtts://169.254.169.254", 403)],
)
def test_brokers_obey_the_rules_for_addresses(open_server, url, status):
    server = open_server(access=AccessRules("0.0.0.0", "token", hosts=frozenset({"broker.test"})))
    with pytest.raises(ApiError) as refused:
        server.add(targets=[{"url": url}])
    assert refused.value.status == status
    server.add(targets=[{"url": "mqtt://broker.test"}])


@pytest.mark.parametrize("url", ["mqtt://", "mqtt://h/a+b", "mqtt://h/%23", "mqtt://h?x=1", "mqtt://h:port"])
def test_a_malformed_broker_is_refused(open_server, url):
    with pytest.raises(mqtt.UserError):
        open_server().add(targets=[{"url": url}])


def test_too_many_brokers_and_needless_secrets_are_refused(open_server):
    server = open_server()
    with pytest.raises(ApiError, match="password"):
        server.add(targets=[{"url": "mqtt://127.0.0.1:1", "secret": "hush"}])
    for number in range(mqtt.MOST_BROKERS):
        server.add(watch=f"w{number}", targets=[{"url": f"mqtt://127.0.0.1:1/{number}"}])
    server.add(watch="known", targets=[{"url": "mqtt://127.0.0.1:1/0"}])
    with pytest.raises(ApiError) as refused:
        server.add(watch="more", targets=[{"url": "mqtt://127.0.0.1:1/more"}])
    assert refused.value.status == 429


def test_without_the_package_a_broker_is_refused_with_the_remedy(open_server, monkeypatch):
    monkeypatch.setitem(sys.modules, "paho", None)
    monkeypatch.setattr(mqtt, "find_spec", lambda name: None)
    with pytest.raises(mqtt.UserError, match=r"flash-vstream\[mqtt\]"):
        open_server().add(targets=[{"url": "mqtt://127.0.0.1"}])


def test_the_last_will_tells_that_a_server_was_killed(tiny_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    options = ["--stream", f"door={video}", "--fps", "5", "--state", str(tmp_path / "state")]
    watch = {"id": "dog", "event": "anything", "threshold": 1e-9, "min_seconds": 0}
    with running(tmp_path, ANYONE) as broker, subscribed(broker) as seen:
        with serving(str(tiny_folder), *options) as server:
            new = watch | {"targets": [{"url": url_of(broker)}]}
            assert server.call("POST", "/v1/streams/door/watches", new)[0] == 201
            until(lambda: seen.at(f"{BASE}/alert"))
            assert seen.retained["flash-vstream/status"] == b"online"
            server.process.kill()
            until(lambda: seen.retained["flash-vstream/status"] == b"offline")
        with serving(str(tiny_folder), *options):
            until(lambda: seen.retained["flash-vstream/status"] == b"online")
        assert seen.retained["flash-vstream/status"] == b"offline"
    ids = {json.loads(payload)["id"] for payload in seen.at(f"{BASE}/alert")}
    assert len(ids) == 1
