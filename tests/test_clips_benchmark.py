"""The benchmark of real clips: what is held out, how streams are joined, what counts as right; and its command."""

import json
from pathlib import Path

import pytest

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.clips import FPS, SCENES, STREAMS, ClipJudge, build_clips
from flash_vstream.evaluate.loading import load_items
from flash_vstream.evaluate.mini import KINDS
from flash_vstream.synthetic.annotations import read_annotations
from flash_vstream.synthetic.clips import frames_of_clips, held_out
from helpers.cli import run
from helpers.videos import write_video

ACTIONS = [f"{verb}{thing}" for verb in ("Throwing", "Washing", "Painting") for thing in "ABCD"]


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three groups of each of twelve actions; the clips of the third are there."""
    folder, rows = tmp_path / "clips", []
    folder.mkdir()
    for number, action in enumerate(ACTIONS):
        for group in (4, 1, 9):
            key = f"v_{action}_g{group:02}_c01.mp4"
            words = {"caption": f"A person does {action} in room {group}.", "short": f"Somebody is {action}"}
            rest = {"place": "room", "people": 1, "objects": [], "qa": []}
            rows.append({"clip": key, "action": action, **words, **rest})
            if group == 9:
                write_video(folder / key, frames=20 + 5 * (number % 3))
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_streams_are_joined_from_held_out_clips_and_causal(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    folder = build_clips(clips)
    assert build_clips(clips) == folder  # nothing is made twice
    records = json.loads((folder / "clips.json").read_text())
    scenes = json.loads((folder / "scenes.json").read_text())
    assert len(records) == STREAMS
    assert all("_g09_" in key for key in scenes)
    items = load_items(BENCHMARKS["clips"], folder)
    assert {item.kind for item in items} == set(KINDS.values())
    assert all(item.start <= item.end for item in items)
    durations = {record["video_id"]: record["duration"] for record in records}
    assert all(item.end <= durations[item.video] for item in items)
    assert all(SCENES[0] * 2 - 1 / FPS <= duration for duration in durations.values())
    yes = [item.answer.startswith("Yes") for item in items if item.answer.startswith(("Yes", "No"))]
    assert 0.35 < sum(yes) / len(yes) < 0.65
    judge = ClipJudge(folder)
    for item in items:
        assert judge.judge(item.question, item.answer, item.answer).correct, item
        assert not judge.judge(item.question, item.answer, "Wood").correct, item


def test_a_description_is_right_by_its_action(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    judge = ClipJudge(build_clips(clips))
    truth = "A person does WashingA in room 9."
    assert judge.judge("What now?", truth, "somebody does washinga").correct
    assert not judge.judge("What now?", truth, "somebody does washingb").correct
    assert not judge.judge("What now?", truth, "a person in room 9").correct  # true of every clip


def test_the_held_out_third_is_told_from_the_rest(clips):
    annotations = read_annotations(clips / "annotations.jsonl")
    assert held_out(annotations) == sorted(f"v_{action}_g09_c01.mp4" for action in ACTIONS)
    with pytest.raises(UserError, match="has no group in its name"):
        held_out({"one.mp4": next(iter(annotations.values()))})


def test_clips_without_times_play_at_ucf101s_rate(tmp_path):
    write_video(tmp_path / "a.mp4", frames=50, times=[i / 1000 for i in range(50)])
    write_video(tmp_path / "b.mp4", frames=20, rate=10)
    frames = frames_of_clips(tmp_path, ["a.mp4", "b.mp4"], 2.0, 32)
    assert {key: len(own) for key, own in frames.items()} == {"a.mp4": 4, "b.mp4": 4}
    with pytest.raises(UserError, match=r"lacks 1 of 1 clips, c\.mp4"):
        frames_of_clips(tmp_path, ["c.mp4"], 2.0, 32)


def test_the_command_builds_asks_and_compares_with_the_newest_frames(clips, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    done = run("eval", "clips", "--data", clips, "--model", tiny_folder, "--limit", 7)
    assert done.returncode == 0, done.stderr
    assert "recent:4" in done.stdout
    assert "backward" in done.stdout
    assert "real time" in done.stdout
    one, two = sorted((tmp_path / "runs" / "eval").glob("clips-*.jsonl"))
    assert run("eval", "compare", one, two, "--data", clips).returncode == 0
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "annotations.jsonl").write_text((clips / "annotations.jsonl").read_text())
    with pytest.raises(UserError, match="lacks 12 of 12 clips"):
        build_clips(lonely)
