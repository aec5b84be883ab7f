"""Prediction files: never mixed between runs, never wiped, failures retried; videos that end too early."""

import json
from pathlib import Path

import pytest
import torch

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.judges import Judgement, OfflineJudge
from flash_vstream.evaluate.loading import load_items
from flash_vstream.evaluate.report import headline, judged, summary
from flash_vstream.evaluate.runner import TOO_SHORT, Run, run_benchmark, weights_hash
from flash_vstream.pipeline import FlashVStream
from helpers.cli import run
from helpers.videos import write_video

BENCHMARK = BENCHMARKS["rvs-ego"]
TURNS = [{"question": "What?", "answer": "A box.", "start_time": 0, "end_time": end} for end in (2, 5, 30)]
ROWS = [{"video_id": "kitchen", "video_path": "kitchen.mp4", "duration": 6.0, "conversations": TURNS}]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "rvs"
    (folder / "videos").mkdir(parents=True)
    write_video(folder / "videos" / "kitchen.mp4", frames=60)
    (folder / "rvs_ego.json").write_text(json.dumps(ROWS))
    return folder


def answered(tiny, data, output, protocol="causal", **more):
    job = Run("rvs-ego", "tiny", "star", protocol, 2.0, **more)
    return run_benchmark(job, BENCHMARK, load_items(BENCHMARK, data), data, FlashVStream(*tiny), output)


@pytest.mark.parametrize("protocol", ["causal", "clip", "whole"])
def test_a_video_that_ends_before_the_question_is_a_failure(tiny, data, tmp_path, protocol):
    rows = answered(tiny, data, tmp_path / "out.jsonl", protocol)
    assert [row["error"] for row in rows] == [None, None, TOO_SHORT]
    report = summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARK)
    assert (report["failed"], report["failures"]) == (1, {TOO_SHORT: 1})
    assert "INCOMPLETE: 1 of 3" in headline(report)


def test_questions_whose_video_was_missing_are_asked_again(tiny, data, tmp_path):
    video = data / "videos" / "kitchen.mp4"
    video.rename(tmp_path / "away.mp4")
    output = tmp_path / "out.jsonl"
    assert all(row["error"] for row in answered(tiny, data, output))
    (tmp_path / "away.mp4").rename(video)
    assert [row["error"] for row in answered(tiny, data, output)] == [None, None, TOO_SHORT]
    assert len(output.read_text().splitlines()) == 3


def test_new_weights_never_meet_old_predictions(tiny, data, tmp_path):
    model = tiny[0]
    before = weights_hash(model)
    assert before == weights_hash(model)
    answered(tiny, data, tmp_path / "out.jsonl", weights=before)
    name, weight = next(iter(model.named_parameters()))
    with torch.no_grad():
        kept = weight.flatten()[0].item()
        weight.view(-1)[0] += 1
        after = weights_hash(model)
        weight.view(-1)[0] = kept
    assert before != after, name
    with pytest.raises(UserError, match="weights differ"):
        answered(tiny, data, tmp_path / "out.jsonl", weights=after)


def test_the_command_keys_its_predictions_by_weights_and_memory(tiny_folder, tiny, data, tmp_path):
    output = tmp_path / "out.jsonl"
    done = run("eval", "rvs-ego", "--data", data, "--model", tiny_folder, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    key = json.loads(done.stdout)["run"]
    assert len(key["weights"]) == 16
    assert key["star"] == tiny[0].config.star.to_dict()
    assert key["version"]
    assert key["engine"] == FlashVStream.from_pretrained(str(tiny_folder)).generator.engine.name
    other = run("eval", "rvs-ego", "--data", data, "--model", tiny_folder, "--output", output, "--dtype", "float32")
    assert (other.returncode, "engine differ" in other.stderr) == (
        (0, False) if key["engine"] == "pytorch" else (2, True)
    )


@pytest.mark.parametrize(
    "content",
    [
        b"name,score\na,1\n",
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=1).encode(),
        b'{"id": "1"}\n',
        b"\xff\xfe\x00",
        b'{"judge": "x"}\nnot JSON\n',
        b'{"id": "1", "question": "a record without a line end"}',
        b'{"id": "1", "video": "", "question": "", "answer": "", "choices": [], "prediction": 0, "error": 0, "run": 3}',
    ],
)
def test_a_file_that_is_not_ours_is_refused_untouched(tiny_folder, data, tmp_path, content):
    output = tmp_path / "results.csv"
    output.write_bytes(content)
    done = run("eval", "rvs-ego", "--data", data, "--model", tiny_folder, "--output", output)
    assert done.returncode == 2
    assert "name another --output" in done.stderr
    assert output.read_bytes() == content


def test_predictions_about_other_annotations_are_not_taken_for_these(tiny, data, tmp_path):
    """Files of one benchmark may give other questions the same ids."""
    output = tmp_path / "out.jsonl"
    answered(tiny, data, output)
    kept = output.read_bytes()
    rows = [{**ROWS[0], "conversations": [{**TURNS[0], "question": "Is it dark?", "answer": "Yes."}, *TURNS[1:]]}]
    (data / "rvs_ego.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="question, answer, kind of kitchen/0 differ"):
        answered(tiny, data, output)
    assert output.read_bytes() == kept


@pytest.mark.parametrize("content", [b'{"a": 1}\nsecret', b"\xff\xfe\x00"])
def test_a_file_that_holds_no_judgements_is_refused_untouched(tmp_path, content):
    class AnyJudge:
        name = "any"

        def judge(self, question, answer, prediction):
            return Judgement(True, 5.0)

    store = tmp_path / "out.judged.jsonl"
    store.write_bytes(content)
    row = {"id": "1", "choices": [], "error": None, "question": "?", "answer": "!", "prediction": "."}
    with pytest.raises(UserError, match="not a file of judgements"):
        judged([row], AnyJudge(), store)
    assert judged([row], OfflineJudge(), store)[0]["correct"] is False  # its judgements are kept nowhere
    assert store.read_bytes() == content


def test_what_is_compared_must_be_predictions(tmp_path):
    for text, message in (("3\n", "not a file of predictions"), ("", "holds no predictions")):
        (tmp_path / "a.jsonl").write_text(text)
        done = run("eval", "compare", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize("fps", ["0", "-1", "nan"])
def test_frames_a_second_must_be_above_nought(tiny_folder, data, tmp_path, fps):
    options = ("--data", data, "--model", tiny_folder, "--output", tmp_path / "out.jsonl", "--fps", fps)
    done = run("eval", "rvs-ego", *options)
    assert done.returncode == 2
    assert "must be above 0" in done.stderr


def test_memories_side_by_side_come_with_judge_failures_and_published_results(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = ("Scene Summary", "event occurrence", "event occurrence")
    turns = [{**turn, "answer_type": kind} for turn, kind in zip(TURNS, kinds, strict=True)]
    (data / "rvs_ego.json").write_text(json.dumps([{**ROWS[0], "conversations": turns}]))
    done = run("eval", "rvs-ego", "--data", data, "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert f"1 x {TOO_SHORT} (recent:4)" in done.stdout
    assert "judge (star): offline-rules" in done.stdout
    assert "published: Flash-VStream-7B" in done.stdout
    assert "real time" in done.stdout
    assert "backward" in done.stdout
