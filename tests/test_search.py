"""Descriptions as events and as a transcript, and one search over all streams of a state folder."""

import json
import time
from itertools import pairwise

import pytest
from fastapi.testclient import TestClient

from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.messages import Alert, Describe, Report, Watch
from flash_vstream.live.published import save_state
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.standing_questions import StandingQuestions
from flash_vstream.live.stream_state import Pictures, empty_slots, stream_state
from flash_vstream.pipeline import FlashVStream
from flash_vstream.sample_clips import CAR, STREET
from flash_vstream.serve import search, transcript
from flash_vstream.serve.app import make_app
from flash_vstream.serve.security import AccessRules
from flash_vstream.serve.service import NamedSource, Service
from flash_vstream.serve.transcript import MARK, Transcript
from flash_vstream.serve.watch_api import _captions
from flash_vstream.video import read_frames
from flash_vstream.wheels import cached_path
from helpers.asynchronous import run_async
from helpers.cli import run
from helpers.videos import write_video
from helpers.vlms import tiny_vlm
from helpers.waiting import until
from helpers.watching import Shared, work


def captions(reports):
    return [report.alert for report in reports if report.alert is not None]


def test_a_stream_is_described_when_it_is_time_and_it_has_changed(tiny, tmp_path):
    standing = StandingQuestions(FlashVStream(*tiny), share=1.0)
    shared = Shared(standing._pipeline, tmp_path / "state")
    standing.set(Watch("d", shared.shared.path, "", Describe(10.0)))
    shared.write(0.0)
    (first,) = captions(work(standing))
    assert (first.kind, first.time, first.evidence[-1]) == ("caption", 0.0, 0.0)
    same = shared.features
    for at in (4.0, 10.0):
        shared.write(at, features=same if at == 10 else None)  # too early, then the same scene again
        assert captions(work(standing)) == []
    shared.write(11.0)
    (second,) = captions(work(standing))
    assert second.time == 11.0
    state = standing._watches["d"][1].state
    assert (state.events, state.error) == (2, None)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return tiny_vlm("smolvlm", tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def state(vlm, tmp_path_factory):
    """A state folder with two streams and captions of both."""
    folder = tmp_path_factory.mktemp("searched") / "state"
    clip = write_video(folder.parent / "clip.mp4", frames=40)
    named = {name: NamedSource(str(clip), 5.0) for name in ("door", "back.yard")}
    service = Service(str(vlm), AccessRules(), folder, streams=named, describe=1.0)
    client = TestClient(make_app(service), base_url="http://127.0.0.1")
    try:
        until(lambda: all(status.state == "ended" for status in service.statuses()))
        until(lambda: client.get("/v1/streams/door/transcript").json())
        said = client.get("/v1/streams/door/transcript").json()
        assert {caption["stream"] for caption in said} == {"door"}

        async def events(number, most):
            return [event async for event in _captions(service, "door", number, lambda: next(most, True))]

        assert [json.loads(event["data"]) for event in run_async(events, 0, iter([False]))][: len(said)] == said
        alert = Alert("caption", 3.0, 3.0, 1.7e9, 1.0, None, "A RED truck stops.")
        service._take_report(Report(f"{MARK}door", {}, alert))
        (found,) = client.get("/v1/streams/door/transcript?q=red+TRUCK").json()
        assert (found["text"], found["time"]) == ("A RED truck stops.", 3.0)
        assert client.get("/v1/streams/door/transcript?q=red+car").json() == []
        assert client.get("/v1/streams/none/transcript").status_code == 404
        (last,) = client.get("/v1/streams/door/transcript?limit=1").json()
        assert last == found
        assert all(
            own["id"] < found["id"] for own in client.get(f"/v1/streams/door/transcript?before={found['id']}").json()
        )
        renamed = client.patch("/v1/streams/door", json={"name": "gate"})
        assert renamed.status_code == 200
        assert len(client.get("/v1/streams/gate/transcript?q=truck").json()) == 1
        until(lambda: service.status("gate").time is not None)
        service.save()
    finally:
        service.close()
    return folder


def test_all_streams_are_searched_and_moments_have_their_picture(state, vlm, tmp_path):
    options = ["--model", str(vlm), "--json"]
    found = json.loads(run("search", state, "a red truck", *options, "--limit", "50").stdout)
    streams = {moment["stream"] for moment in found["moments"]}
    assert streams == {"gate", "back.yard"}
    scores = [moment["score"] for moment in found["moments"]]
    assert scores == sorted(scores, reverse=True)
    for moment in found["moments"]:
        assert moment["start"] <= moment["time"] <= moment["end"]
        assert abs(moment["clock"] - time.time()) < 3600
        assert moment["picture"].startswith("data:image/jpeg;base64,")
    for stream in streams:
        times = sorted(moment["time"] for moment in found["moments"] if moment["stream"] == stream)
        assert all(later - earlier >= search.APART_SECONDS for earlier, later in pairwise(times))
    assert [caption["text"] for caption in found["captions"]] == ["A RED truck stops."]
    few = json.loads(
        run("search", state, "green truck", *options, "--limit", "1", "--pictures", tmp_path / "shots").stdout
    )
    (moment,) = few["moments"]
    assert few["captions"] == []
    assert (tmp_path / "shots").joinpath(f"{moment['stream']}-{moment['time']:.0f}s.jpg").read_bytes()[
        :2
    ] == b"\xff\xd8"


def test_a_damaged_memory_leaves_the_others(state, vlm, caplog):
    (state / "memories" / "bad.safetensors").write_bytes(b"no memory")
    try:
        found = search.search_memories(state, "truck", FlashVStream.from_pretrained(str(vlm)), 5)
    finally:
        (state / "memories" / "bad.safetensors").unlink()
    assert {own.stream for own in found} == {"gate", "back.yard"}
    assert "'bad'" in caplog.text


def test_nano_finds_the_stream_that_shows_it(tmp_path):
    """With the shipped model, on two real videos: a street, and a man in a car."""
    pipeline = FlashVStream.from_pretrained("nano", device="cpu")
    (tmp_path / "memories").mkdir()
    for name, clip in (("street", STREET), ("car", CAR)):
        stream = pipeline.new_stream()
        pictures = Pictures.of(stream.memory)
        shared = SharedTensors.create(str(tmp_path / name), state_layout(stream.memory))
        for frame in read_frames(str(cached_path(clip)), 1.0, pipeline.processor.image_processor.size):
            pipeline.watch([frame], stream=stream)
            pictures.see(frame, set(), stream.snapshot().longterm.exemplar.tolist())
        shared.publish(
            stream_state(stream.memory, empty_slots(stream.memory), pictures), {"time": frame.time, "clock": 1e9}
        )
        assert save_state(shared, tmp_path / "memories" / f"{name}.safetensors")
    found = search.search_memories(tmp_path, "a bicycle", pipeline, 3)
    assert (found[0].stream, found[0].seen) == ("street", True)
    assert found[0].picture[:2] == b"\xff\xd8"
    assert found[0].clock <= 1e9
    (nearest,) = search.search_memories(tmp_path, "an elephant", pipeline, 1)
    assert not nearest.seen


def test_what_cannot_be_searched_is_said(state, vlm, tmp_path):
    model = ["--model", str(vlm)]
    for arguments, why in (
        ([tmp_path / "none", "dog"], "is not a folder"),
        ([tmp_path, "dog", *model], "there are no memories in it"),
        ([state, " ", *model], "nothing to look for"),
        ([state, "when was it", *model], "names nothing"),
    ):
        result = run("search", *arguments)
        assert (result.returncode, why in result.stderr) == (2, True), result.stderr


def test_a_transcript_keeps_the_newest_and_forgets_removed_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(transcript, "KEPT_CAPTIONS", 3)
    kept = Transcript(tmp_path)
    for number in range(5):
        kept.add("door" if number % 2 else "yard", float(number), 0.0, f"caption {number}")
    assert [own.time for own in kept.captions()] == [2, 3, 4]
    assert [own.time for own in kept.captions("yard")] == [2, 4]
    assert [own.time for own in kept.captions(after=kept.captions()[0].id, limit=1)] == [3]
    kept.remove_other_streams(["yard"])
    kept.close()
    again = Transcript(tmp_path)
    assert [own.stream for own in again.captions()] == ["yard", "yard"]
    assert [own.text for own in again.captions(words="CAPTION 4")] == ["caption 4"]
    again.close()


def test_a_recording_is_described_on_the_command_line(tiny_folder, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=20)
    options = ["--model", str(tiny_folder), "--fps", "5", "--describe", "1s", "--dry-run", "--json"]
    said = [json.loads(line) for line in run("watch", clip, *options).stdout.splitlines()]
    assert said
    assert {own["state"] for own in said} == {"caption"}
    times = [own["time"] for own in said]
    assert times[0] == 0
    assert all(later - earlier >= 1 for earlier, later in pairwise(times))
    for wrong in ("0s", "often"):
        assert run("watch", clip, "--describe", wrong).returncode == 2
