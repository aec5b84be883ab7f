"""Standing questions from the frame to the receiver: the real workers, HTTP, and the command line."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from fastapi.testclient import TestClient

from flash_vstream.live.messages import Watch
from flash_vstream.live.standing_questions import Lookout, StandingQuestions
from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.models.event_score import EventScorer
from flash_vstream.pipeline import FlashVStream
from flash_vstream.serve.app import make_app
from flash_vstream.serve.security import AccessRules
from flash_vstream.serve.service import NamedSource, Service
from flash_vstream.serve.watch_api import _events
from helpers.asynchronous import run_async
from helpers.cli import run
from helpers.videos import write_video
from helpers.waiting import until
from helpers.watching import Shared, work
from helpers.webhooks import receiving

ANYTHING = 1e-9
"""A threshold that whatever the tiny model says exceeds."""


class Certain:
    """Stands in for a scorer: looks at every frame, and is told what it sees."""

    is_cheap = True

    def __init__(self, pipeline):
        self.generator, self.sees, self.agrees, self.error = pipeline.generator, 0.9, 0.8, None

    def event(self, text):
        return text

    def score(self, event, snapshot):
        if self.error is not None and event == "bad":
            raise self.error
        return self.sees

    def confirm(self, event, snapshot):
        return self.agrees, self.generator.read(snapshot)


@pytest.fixture
def watching(tiny, tmp_path):
    pipeline = FlashVStream(*tiny)
    standing = StandingQuestions(pipeline, share=1.0)
    standing._scorer = Certain(pipeline)
    return standing, Shared(pipeline, tmp_path / "state")


def test_an_event_is_confirmed_and_told_once_with_its_sentence(watching):
    standing, shared = watching
    standing.set(Watch("dog", shared.shared.path, "a dog", WatchRule(min_seconds=1)))
    assert work(standing) == []  # no frame yet
    shared.write(0.0)
    assert [(report.state["phase"], report.alert) for report in work(standing)] == [("coming", None)]
    shared.write(1.0, skipped=2)
    reports = work(standing)
    (alert,) = [report.alert for report in reports if report.alert is not None]
    assert (alert.kind, alert.began, alert.time, alert.confirmation) == ("start", 0.0, 1.0, 0.8)
    assert 1.0 in alert.evidence
    assert isinstance(alert.sentence, str)
    assert reports[-1].state["missed"] == 2
    shared.write(2.0)
    assert [report.alert for report in work(standing) if report.alert] == []


def test_what_the_language_model_does_not_agree_to_is_not_told(watching):
    standing, shared = watching
    standing._scorer.agrees = 0.2
    standing.set(Watch("dog", shared.shared.path, "a dog", WatchRule(min_seconds=0)))
    shared.write(0.0)
    (report,) = work(standing)
    assert (report.state["phase"], report.state["refused"], report.alert) == ("refused", 1, None)


def test_an_error_of_one_watch_concerns_no_other(watching):
    standing, shared = watching
    for event in ("bad", "good"):
        standing.set(Watch(event, shared.shared.path, event, WatchRule(min_seconds=0)))
    standing._scorer.error = RuntimeError("broken")
    shared.write(0.0)
    reports = work(standing)
    assert [report.watch for report in reports if report.alert is not None] == ["good"]
    assert [report.state["error"] for report in reports if report.watch == "bad"] == ["RuntimeError: broken"]


def test_watches_go_on_after_a_restart_and_where_their_stream_is(watching, tmp_path):
    standing, shared = watching
    rule = WatchRule(min_seconds=0, cooldown_seconds=0)
    standing.set(Watch("dog", shared.shared.path, "a dog", rule))
    shared.write(0.0)
    state = work(standing)[-1].state
    again = StandingQuestions(standing._pipeline, share=1.0)
    again._scorer = standing._scorer
    again.set(Watch("dog", shared.shared.path, "a dog", rule, state))
    assert work(again) == []  # the same frame is not looked at twice
    shared.write(1.0)
    reports = work(again)
    assert [report.alert for report in reports if report.alert] == []  # it has been told
    again.set(Watch("dog", str(tmp_path / "gone"), "a dog", rule, state))
    assert work(again) == []
    assert list(again._streams) == []  # the old state is released


def test_watches_keep_to_their_share(watching):
    standing, shared = watching
    standing._share = 1e-6
    standing.set(Watch("dog", shared.shared.path, "a dog", WatchRule(min_seconds=9)))
    shared.write(0.0)
    assert len(work(standing)) == 1
    shared.write(1.0)
    assert work(standing) == []
    standing._rest_until = 0.0
    shared.write(2.0)
    work(standing)
    assert standing._watches["dog"][1].state.missed == 1


def test_streams_share_what_there_is_in_turn(watching, tmp_path):
    standing, first = watching
    standing._share = 1e-6
    second = Shared(standing._pipeline, tmp_path / "second")
    for name, stream in (("first", first), ("second", second)):
        standing.set(Watch(name, stream.shared.path, "a dog", WatchRule(min_seconds=9)))
    for at in range(4):
        first.write(float(at))
        second.write(float(at))
        standing._rest_until = 0.0
        work(standing)
    assert [lookout.state.looks for _, lookout in standing._watches.values()] == [2, 2]


def test_a_model_without_grounding_reads_only_frames_that_changed(tiny):
    pipeline = FlashVStream(*tiny)
    lookout = Lookout(EventScorer(pipeline.generator), "a dog", WatchRule(threshold=ANYTHING))
    read, asked = lookout.scorer.generator.read, []
    lookout.scorer.generator.read = lambda *arguments: asked.append(1) or read(*arguments)
    config = pipeline.model.config
    frame = torch.randn(1, config.pooled_size**2, config.vision_config.hidden_size)
    stream = pipeline.new_stream()
    for at, features in ((0.0, frame), (1.0, frame * 1.01), (2.0, -frame)):
        stream.memory.write(features, [at])
        assert lookout.is_due(at)
        list(lookout.look(stream.snapshot()))
        if at < 2:
            assert len(asked) == 1
    assert not lookout.is_due(2.5)
    assert len(asked) == 3  # the third is the confirmation
    assert 0 <= lookout.state.confidence <= 1


# --- over HTTP


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("watched") / "clip.mp4", frames=40)


@pytest.fixture(scope="module")
def service(tiny_folder, video):
    running = Service(str(tiny_folder), AccessRules(), None, streams={"door": NamedSource(str(video), 5.0)})
    yield running
    running.close()


def test_an_event_is_told_by_webhook_and_event_stream(service, video):
    client = TestClient(make_app(service), base_url="http://127.0.0.1")
    path = "/v1/streams/door/watches"
    for wrong in ({}, {"event": " "}, {"event": "a", "when": "never"}, {"event": "a", "threshold": 1}):
        assert client.post(path, json=wrong).status_code == 422
    assert client.post("/v1/streams/none/watches", json={"event": "a"}).status_code == 404
    with receiving() as receiver:
        new = {"id": "any", "event": "anything", "threshold": ANYTHING, "min_seconds": 0, "cooldown_seconds": 3600}
        made = client.post(path, json=new | {"targets": [{"url": receiver.url, "secret": "hush"}]})
        target = {"url": receiver.url, "signed": True, "error": None}
        assert (made.status_code, made.json()["targets"]) == (201, [target])
        until(lambda: receiver.requests)
    (alert,) = client.get("/v1/streams/door/alerts").json()
    assert (alert["state"], alert["watch"], alert["event"]) == ("start", "any", "anything")
    assert receiver.alerts()[0]["id"] == alert["id"]
    assert client.get(f"/v1/alerts/{alert['id']}/picture").content[:2] == b"\xff\xd8"
    assert client.get("/v1/alerts/none/picture").status_code == 404

    async def events(number, most):
        return [event async for event in _events(service, "door", number, lambda: next(most, True))]

    (event,) = run_async(events, 0, iter([False, False]))
    assert (event["id"], json.loads(event["data"])) == (alert["id"], alert)
    assert run_async(events, service.watches.store.newest, iter([False])) == []

    told = until(lambda: (body := client.get(f"{path}/any").json())["events"] == 1 and body)
    assert (told["error"], told["looks"] > 0) == (None, True)
    assert client.patch(f"{path}/any", json={"paused": True}).json()["phase"] == "paused"
    assert client.patch(f"{path}/any", json={}).status_code == 422
    assert [watch["id"] for watch in client.get(path).json()] == ["any"]
    service.question_client.worker.kill()
    until(lambda: service.question_client.worker.restarts == 1 and service.question_client.worker.alive)
    again = client.post(path, json=new | {"id": "again", "when": "every"})
    assert again.status_code == 201
    until(lambda: len(client.get("/v1/streams/door/alerts").json()) == 2)
    assert client.delete(f"{path}/again").status_code == 204
    assert client.delete(f"{path}/again").status_code == 404
    assert "flash_vstream_alerts 2.0" in client.get("/metrics").text


# --- on the command line


def test_a_recording_is_rehearsed(tiny_folder, video):
    options = ["--model", str(tiny_folder), "--fps", "5", "--threshold", str(ANYTHING), "--min-seconds", "1"]
    told = run("watch", video, "--tell", "anything", "--dry-run", "--json", "--expect", "0s-3s", *options)
    alert, scored = (json.loads(line) for line in told.stdout.splitlines())
    assert (alert["event"], alert["state"], alert["began"], alert["time"]) == ("anything", "start", 0.0, 1.0)
    assert scored == {"alerts": 1, "precision": 1.0, "recall": 1.0, "median_delay": 1.0}
    for wrong in (["--dry-run"], ["--tell", "a", "--expect", "1s"], ["--tell", "a", "--when", "never"]):
        assert run("watch", video, *wrong).returncode == 2


LIVE = [sys.executable, "-m", "flash_vstream", "watch"]


def test_a_live_source_is_told_of_and_described_until_it_ends(tiny_folder, video):
    options = ["--model", str(tiny_folder), "--fps", "5", "--threshold", str(ANYTHING), "--min-seconds", "0"]
    command = [*LIVE, str(video), "--tell", "anything", "--when", "every", "--describe", "2s", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (alert,) = [own for own in told if own["state"] == "start"]
    assert (alert["event"], alert["time"] < 4) == ("anything", True)
    captions = [own for own in told if own["state"] == "caption"]
    assert captions
    assert all(own["text"] for own in captions)


def test_ctrl_c_ends_the_telling_and_every_process(tiny_folder, video):
    options = ["--model", str(tiny_folder), "--fps", "5", "--threshold", str(ANYTHING), "--min-seconds", "0"]
    command = [*LIVE, str(video), "--loop", "--tell", "anything", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        line = running.stdout.readline()
        assert "start  anything" in line
        children = psutil.Process(running.pid).children(recursive=True)
        assert children
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode in (0, 130)
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=60)[1] == []
