"""What a site of many streams needs, and the load generator."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from flash_vstream.bench import load
from flash_vstream.bench.scale import Costs, Site, measured, needs
from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice
from flash_vstream.pipeline import FlashVStream
from helpers.server import serving
from helpers.videos import write_video

COSTS = Costs(
    frame_seconds=0.04,
    question_seconds=0.3,
    state_bytes=10_000_000,
    snapshot_seconds=0.02,
    copy_seconds=0.1,
    prompt_bytes=None,
)


def test_needs_follow_from_costs():
    found = needs(COSTS, Site(fps=1.0, questions_a_minute=6.0, snapshot_every=10.0), 100)
    assert found["frame_workers"] == 5  # 100 frames a second of 0.04 s are 4 at work, 5 at four fifths
    assert found["question_workers"] == 5  # 10 questions a second of 0.4 s
    assert found["server"]["processor"] == pytest.approx(10 * 0.02 / 0.8)
    assert found["server"]["network"] == pytest.approx(10 * 10e6 / (0.8 * 1.25e9))
    assert found["server"]["disk"] == pytest.approx(10 * 10e6 / (0.8 * 1e9))
    assert (found["servers"], found["breaks_first"]) == (1, "processor")
    assert found["state_gigabytes"] == pytest.approx(2.0)


def test_what_breaks_first_depends_on_costs():
    assert needs(replace(COSTS, snapshot_seconds=0.001), Site(), 100)["breaks_first"] == "disk"
    slow = Site(network_bytes=1.25e8, disk_bytes=1e10)
    assert needs(replace(COSTS, snapshot_seconds=0.001), slow, 100)["breaks_first"] == "network"


@pytest.mark.parametrize("streams", [1, 100, 10_000])
def test_a_hundred_times_as_many_streams_need_a_hundred_times_as_much(streams):
    few, many = needs(COSTS, Site(), streams), needs(COSTS, Site(), 100 * streams)
    for name in ("frame_workers", "question_workers", "machines", "servers"):
        assert 100 * (few[name] - 1) <= many[name] <= 100 * few[name]


def test_costs_are_measured(quick_folder):
    costs = measured(FlashVStream.from_pretrained(ModelChoice(str(quick_folder))))
    assert costs.state_bytes > 100_000
    assert costs.prompt_bytes > 100
    assert min(costs.frame_seconds, costs.question_seconds, costs.copy_seconds) > 0
    assert costs.snapshot_seconds > costs.copy_seconds


def put_load(*arguments):
    """``run_load`` in a thread of its own: a browser of earlier tests keeps an event loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load.run_load, *arguments).result()


def test_a_load_is_put_on_a_server_and_taken_away(quick_folder, tmp_path, monkeypatch):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    monkeypatch.setattr(load, "fetch", lambda clips: [video])
    with serving(str(quick_folder), "--allow-folder", str(tmp_path)) as server:
        found = put_load(server.url, 2, 5.0, 2.0, 1.5, None)
        assert server.call("GET", "/v1/streams")[1] == []
        assert found["questions"] == {"done": 3}
        assert found["streams"] == 2
        assert found["slowest_stream_frames_per_second"] > 0
        assert found["first_token_seconds"]["p95"] <= found["answer_seconds"]["p95"]
        monkeypatch.setattr(load, "fetch", lambda clips: ["/etc/hostname"])
        with pytest.raises(UserError, match="cannot watch stream load-0"):
            put_load(server.url, 1, 5.0, 2.0, 1.0, None)
    with pytest.raises(UserError, match="does not answer"):
        put_load(server.url, 1, 5.0, 2.0, 1.0, None)
