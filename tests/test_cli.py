"""The command line from a user's view, with the tiny model and real video files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_vstream import __version__
from flash_vstream.errors import UserError
from flash_vstream.timecode import format_time, parse_time
from helpers.cli import run
from helpers.videos import write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", frames=50)


def test_ask_answers_at_several_moments(tiny_folder, video):
    done = run(
        "ask", video, "what?", "who?", "--at", "4s", "--at", "0:02", "--fps", "2", "--model", tiny_folder, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(a["question"], a["stream_time"]) for a in report["answers"]] == [
        ("what?", 2.0),
        ("who?", 2.0),
        ("what?", 4.0),
        ("who?", 4.0),
    ]
    assert report["frames"] == 9
    answer = report["answers"][0]
    assert answer["first_token_seconds"] > 0
    assert answer["memory"]["tokens"] == 5 + 5 * 16 + 3 * 64 + 64
    assert answer["memory"]["bytes"] > 0
    # Causal: the evidence contains nothing after the moment.
    assert max(slot["end"] for slot in answer["evidence"]) == 2.0
    assert isinstance(answer["answer"], str)


def test_an_answer_is_the_same_whatever_comes_after(tiny_folder, tmp_path):
    brief = write_video(tmp_path / "brief.mp4", frames=21)
    longer = write_video(tmp_path / "longer.mp4", frames=60)
    answers = []
    for path in (brief, longer):
        report = json.loads(run("ask", path, "what?", "--at", "2", "--model", tiny_folder, "--json").stdout)
        answers.append([(a["answer"], a["stream_time"], a["memory"]) for a in report["answers"]])
    assert answers[0] == answers[1]


def test_ask_tells_a_person(tiny_folder, video):
    done = run("ask", video, "what?", "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert "what?" in done.stdout
    assert "looked at" in done.stdout
    assert "first token" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "none.mp4", "what?"], "no video at none.mp4"),
        (["ask", "VIDEO", " "], "a question is empty"),
        (["ask", "VIDEO", "what?", "--fps", "0"], "--fps is 0"),
        (["ask", "VIDEO", "what?", "--at", "soon"], "'soon' is not a time"),
        (["ask", "VIDEO", "what?", "--at", "1h"], "lies after the end"),
        (["ask", "VIDEO", "what?", "--model", "no-such-model"], "no model at no-such-model"),
        (["ask", "VIDEO"], "QUESTION"),
        (["pull", "gigantic"], "no model is called 'gigantic'"),
        (["bench", "everything"], "no bench is called"),
        (["bench", "memory", "--frames", "5"], "--frames must be at least"),
        (["train", "stage1", "none.yaml", "--data", ".", "--output", "out"], "cannot read the training config"),
        (["train", "export", "nowhere", "out"], "holds no adapter"),
        (["serve", "--engine", "other"], "no engine called 'other'"),
        (["serve", "--engine", "ray"], "needs --state FOLDER"),
        (["serve", "--frame-workers", "2"], "need --engine ray"),
        (["serve", "--spare-workers", "0"], "need --engine ray"),
        (["ask", "VIDEO", "what?", "--language-engine", "host:8000"], "must be vllm=http://HOST:PORT/v1"),
        (["dance"], "dance"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(video, tmp_path, arguments, message):
    done = run(*[video if word == "VIDEO" else word for word in arguments], cache=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_models_lists_the_zoo(tmp_path):
    rows = json.loads(run("models", "--json", cache=tmp_path).stdout)
    models = {row["name"]: row["present"] for row in rows if "present" in row}
    assert models == {"nano": False, "flash-vstream-7b": False, "flash-vstream-qwen-7b": False}
    assert "gemma3" in [row["model_type"] for row in rows if "family" in row]
    assert "Apache-2.0" in run("models", cache=tmp_path).stdout


def test_the_command_is_a_process_of_its_own_too(video):
    command = [sys.executable, "-m", "flash_vstream", "ask", str(video), " "]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flash-vstream: a question is empty")


def test_version_and_help():
    assert run("--version").stdout.strip() == __version__
    listed = run("--help").stdout
    assert all(verb in listed for verb in ("ask", "demo", "models", "pull", "train", "bench"))


def test_memory_bench_is_flat():
    done = run("bench", "memory", "--frames", "1200")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["memory"]
    assert report["late_over_early"] < 1.5  # a short run on a busy machine; the full bench measures 1.1
    assert report["memory_bytes"] == pytest.approx(10.7e6, rel=0.02)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("35", 35), ("35s", 35), ("2m", 120), ("1h", 3600), ("1:05", 65), ("90:30", 5430), ("1:02:03.5", 3723.5)],
)
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3", "1:65", "nan", "1:2:3:4", "5 parsecs"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="not a time"):
        parse_time(text)


def test_times_are_written():
    assert [format_time(s) for s in (0, 35.4, 59.7, 65, 3723)] == ["0 s", "35 s", "59 s", "1:05", "1:02:03"]


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way, also of root")
    (tmp_path / "records").mkdir()
    record = {"video": "a.mp4", "segments": [], "questions": [], "tokens": {}, "done": True}
    (tmp_path / "records" / "a.json").write_text(json.dumps(record))
    done = run("vstream-qa", "export", tmp_path / "records", tmp_path / "file" / "out.json")
    assert done.returncode == 2
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr
