"""Every file in examples/, run as a user would: a real camera, a real server, a real training run."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers.rtsp import free_port, rtsp_serving
from helpers.server import serving
from helpers.videos import write_video

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: object) -> str:
    """Run an example in this process, where the imports are already loaded, and return its output."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]), contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def run_as_a_process(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_example_is_tested():
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_a_camera_over_rtsp(quick_folder):
    with rtsp_serving(free_port()) as url:
        options = ("--model", quick_folder, "--fps", 5, "--every", 0.5, "--count", 2)
        done = run_as_a_process("camera_rtsp.py", url, *options)  # its workers import the file too
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = [re.fullmatch(r" *([\d.]+) s  .*\(live, (\d+) frames seen\)", line) for line in lines]
    assert len(found) == 2
    first, second = found
    assert first is not None
    assert second is not None
    assert float(second[1]) > float(first[1])
    assert int(second[2]) > int(first[2]) > 0


def test_a_users_mistake_is_one_message():
    with pytest.raises(SystemExit, match="camera_rtsp: the frame rate is 0; it must be above 0"):
        run_example("camera_rtsp.py", "rtsp://camera.local/stream", "--fps", 0)


def test_openais_client(quick_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    with serving(str(quick_folder), "--stream", f"door={video}", "--fps", "5") as server:
        server.wait_for("/v1/streams/door", lambda _, body: body["time"] is not None)
        printed = run_example("openai_client.py", "door", "What is happening?", "--url", f"{server.url}/v1")
    assert re.search(r"\(as of [\d.]+ s of the stream\)", printed)
    assert printed.count("looked at") == 3


def test_the_memory_alone():
    lines = run_example("memory_on_your_features.py").splitlines()
    assert lines[0] == "200 frames in 272 tokens; 0 bytes of growth"
    temporal = [line.split()[1:4] for line in lines if line.startswith("temporal")]
    # Five scenes of 40 frames: one slot each.
    assert temporal == [[f"{at}.0-{at + 39}.0", "s", "40"] for at in range(0, 200, 40)]


def test_the_memory_on_a_file_of_features(tmp_path):
    tensors = {"features": torch.randn(12, 64, 16), "times": torch.arange(12).double() * 2}
    save_file(tensors, tmp_path / "mine.safetensors")
    printed = run_example("memory_on_your_features.py", tmp_path / "mine.safetensors")
    assert printed.startswith("12 frames in")
    assert "exemplar at 22.0 s" in printed


@pytest.fixture
def training_data(tmp_path) -> Path:
    """A picture and a clip with one question each, in LLaVA format."""
    Image.new("RGB", (50, 50), (200, 0, 0)).save(tmp_path / "red.png")
    write_video(tmp_path / "clip.mp4")

    def entry(kind: str, name: str, answer: str) -> dict[str, object]:
        question = {"from": "human", "value": "<image>\nWhat is happening now?"}
        return {kind: name, "conversations": [question, {"from": "gpt", "value": answer}]}

    entries = [entry("image", "red.png", "All is red."), entry("video", "clip.mp4", "It brightens.")]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json"


def test_a_finetune(quick_folder, training_data, tmp_path):
    output = tmp_path / "finetuned"
    options = ("--model", quick_folder, "--steps", 2, "--batch-size", 2)
    printed = run_example("finetune_nano.py", training_data, output, *options)
    assert printed.splitlines()[-1] == f"the fine-tuned model is in {output / 'model'}"
    assert (output / "model" / "config.json").exists()
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
