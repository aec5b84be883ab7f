"""lmms-eval with our model, in a separate environment: ``pytest -m slow tests/test_lmms.py``.

Not part of the default suite, because it installs about forty packages. To reuse an environment that
already has them, set ``FLASH_VSTREAM_LMMS`` to its Python.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.videos import write_video

ROOT = Path(__file__).parent.parent
LMMS_EVAL = "lmms-eval==0.7.3"
# What lmms-eval imports to run a task. Its full list has a hundred more, including torchvision, which needs
# a different build of PyTorch from ours.
NEEDED = (
    *("accelerate", "datasets", "evaluate", "ftfy", "httpx", "jinja2", "jsonlines", "loguru", "numexpr", "openai"),
    *("opencv-python-headless", "pytablewriter", "python-dotenv", "pytz", "requests", "sacrebleu", "sqlitedict"),
    *("tenacity", "tqdm-multiprocess", "zstandard"),
)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """A Python that has lmms-eval and this project."""
    if "FLASH_VSTREAM_LMMS" in os.environ:
        return os.environ["FLASH_VSTREAM_LMMS"]
    folder = tmp_path_factory.mktemp("lmms")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    subprocess.run([made, "-m", "pip", "install", "-q", str(ROOT), *NEEDED], check=True)
    subprocess.run([made, "-m", "pip", "install", "-q", "--no-deps", LMMS_EVAL], check=True)
    return made


@pytest.fixture
def tasks(python, tmp_path) -> Path:
    """lmms-eval's own Video-MME task, with local annotations and a local video."""
    where = "import importlib.util; print(importlib.util.find_spec('lmms_eval').submodule_search_locations[0])"
    package = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("utils.py", "_default_template_yaml", "videomme.yaml"):
        shutil.copy(package / "tasks" / "videomme" / name, folder / name)
    task = folder / "videomme.yaml"
    local = task.read_text().replace("lmms-eval/Video-MME", str(tmp_path / "annotations"))
    task.write_text(local.replace("task: videomme", "task: videomme_here").replace("  token: True\n", ""))
    media = tmp_path / "videomme" / "data"
    media.mkdir(parents=True)
    write_video(media / "one.mp4", frames=20)
    common = {
        "videoID": "one",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Law",
        "task_type": "OCR Problems",
    }
    options = ["A. red", "B. blue", "C. green", "D. grey"]
    rows = [
        {**common, "question_id": f"q{i}", "question": f"Which colour {i}?", "options": options, "answer": "ABCD"[i]}
        for i in range(4)
    ]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_lmms_eval_runs_one_of_its_tasks(python, tasks, tiny_folder, tmp_path):
    command = [python, "-m", "lmms_eval", "--model", "flash_vstream", "--model_args", f"model={tiny_folder},fps=2"]
    command += ["--tasks", "videomme_here", "--include_path", str(tasks), "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(answered) == 4
    assert all(row["filtered_resps"] for row in answered)
    assert "videomme_perception_score" in next((tmp_path / "out").rglob("*results*.json")).read_text()
