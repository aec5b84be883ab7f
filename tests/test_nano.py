"""The shipped model on real video. ``make test`` downloads its parts before the tests run."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_vstream import FlashVStream
from flash_vstream.files import file_sha256
from flash_vstream.models import catalog, nano
from flash_vstream.models.small_networks import files_in
from flash_vstream.sample_clips import DEMO_CLIPS, STREET
from flash_vstream.train.export import WEIGHTS
from flash_vstream.wheels import cached_path
from helpers.cli import run

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def pipeline() -> FlashVStream:
    if not catalog.model_folder("nano").exists() or not all(cached_path(clip).exists() for clip in DEMO_CLIPS):
        pytest.fail("nano or the demo's clips are not here; run the tests by: make test")
    return FlashVStream.from_pretrained("nano", device="cpu")


@pytest.fixture
def clip(tmp_path, monkeypatch) -> Path:
    """A real street video as clip.mp4 in the current, temporary folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(cached_path(STREET), tmp_path / "clip.mp4"))


def test_the_adapter_is_the_one_on_its_card():
    card = catalog.adapter_card()
    networks = [name for name in files_in(catalog.NANO_ADAPTER) if name.endswith(".safetensors")]
    files = [catalog.NANO_ADAPTER / name for name in (WEIGHTS, *networks)]
    assert {file.name: file_sha256(file) for file in files} == card["sha256"]
    assert sum(file.stat().st_size for file in files) == card["bytes"] <= 48_000_000


def test_a_full_memory_makes_a_prompt_of_about_300_tokens(pipeline, clip):
    stream = pipeline.watch(clip, fps=5)
    snapshot = stream.snapshot()
    assert len(snapshot.tokens()) == nano.MEMORY.max_tokens == 168
    answer = pipeline.ask(stream, "What is happening now?", max_new_tokens=1).finish()
    assert 220 <= answer.prompt_tokens <= 340


def test_it_describes_a_real_street(pipeline, clip):
    stream = pipeline.watch(clip, until=6)
    text = pipeline.ask(stream, "What is happening now?").finish().text.lower()
    assert re.search(r"bicycle|bike|street|road|rid(es|ing)|walk|cross", text), text
    assert text.endswith(".")
    assert pipeline.ask(stream, "What is happening now?").finish().text.lower() == text


def test_it_objects_to_a_question_about_what_is_not_there(pipeline, clip):
    stream = pipeline.watch(clip, until=6)
    question = "What color is the elephant?"
    answer = pipeline.ask(stream, question)
    assert list(answer) == ["There is no elephant."] == [answer.text]
    assert answer.to_dict()["finish_reason"] == "stop"
    assert answer.first_token_seconds is not None
    assert [slot.share for slot in answer.evidence] == [None] * len(answer.evidence)
    prefix = pipeline.generator.read(stream.snapshot())
    asked = pipeline.generator.ask_many(prefix, ["Is there a person?", question])
    assert asked[1] == answer.text
    assert pipeline.generator.ask(prefix, question, stop=["no"]).finish().text == "There is "


def test_its_story_has_times_in_order_and_repeats_nothing(pipeline, clip):
    stream = pipeline.watch(clip)
    answer = pipeline.ask(stream, "What have I missed?").finish()
    scenes = re.findall(r"(\d+)s: (.+?[.])(?= \d+s:|$)", answer.text)
    assert " ".join(f"{time}s: {sentence}" for time, sentence in scenes) == answer.text
    times = [int(time) for time, _ in scenes]
    assert times[0] == 0
    assert times == sorted(set(times))
    assert times[-1] <= stream.time
    assert all(before[1] != after[1] for before, after in itertools.pairwise(scenes))
    prefix = pipeline.generator.read(stream.snapshot())
    assert pipeline.generator.ask_many(prefix, ["What have I missed?"]) == [answer.text]


def test_answers_do_not_depend_on_how_they_are_asked(pipeline, clip):
    snapshot = pipeline.watch(clip, until=4).snapshot()
    cold = pipeline.ask(snapshot, "What is happening now?").finish().text
    assert pipeline.ask(pipeline.generator.read(snapshot), "What is happening now?").finish().text == cold


def test_the_demo_answers_five_questions_at_three_moments(pipeline):
    done = run("demo", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    moments = [answer["stream_time"] for answer in report["answers"]]
    assert len(moments) == 5
    assert len(set(moments)) == 3
    assert all(answer["answer"] for answer in report["answers"])


# --- the README


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_readmes_python_runs(pipeline, clip):
    (snippet,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "first token after" in done.stdout
    assert done.stdout.count("looked at") == 3


def test_the_readmes_commands_run(pipeline, clip):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("flash-vstream ")]
    assert len(commands) >= 4
    for command in commands:
        script = command.replace("flash-vstream", f"{sys.executable} -m flash_vstream", 1)
        done = subprocess.run(script, shell=True, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip()
        if command == "flash-vstream demo":
            assert done.stdout.count("looked at") == 5


def test_the_readmes_make_commands_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
