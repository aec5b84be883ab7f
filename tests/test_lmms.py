"""lmms-eval with our model, in a separate environment: ``pytest -m slow tests/test_lmms.py``.

That is not part of the default suite, because it installs about forty packages. To reuse an environment that
already has them, set ``FLASH_VSTREAM_LMMS`` to its Python.
"""

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from flash_vstream.pipeline import FlashVStream
from helpers.videos import write_video

ROOT = Path(__file__).parent.parent
LMMS_EVAL = "lmms-eval==0.7.3"
# What lmms-eval imports to run a task. Its full list has a hundred more, including torchvision, which needs
# a different build of PyTorch from ours.
NEEDED = (
    *("accelerate", "datasets", "evaluate", "ftfy", "httpx", "jinja2", "jsonlines", "loguru", "numexpr", "openai"),
    *("opencv-python-headless", "pytablewriter", "python-dotenv", "pytz", "requests", "sacrebleu", "sqlitedict"),
    *("tenacity", "tqdm-multiprocess", "zstandard"),
    "filelock<3.20",  # lmms-eval 0.7.3 imports a module of it that later ones no longer have
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


def package_of(python: str) -> Path:
    where = "import importlib.util; print(importlib.util.find_spec('lmms_eval').submodule_search_locations[0])"
    return Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture
def tasks(python, tmp_path) -> Path:
    """lmms-eval's own Video-MME task, with local annotations and a local video."""
    package = package_of(python)
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


def run_task(python: str, task: str, folder: Path, model: Path, tmp_path: Path) -> list[dict]:
    """Runs a task; returns what lmms-eval logged of each document."""
    command = [python, "-m", "lmms_eval", "--model", "flash_vstream", "--model_args", f"model={model},fps=2"]
    command += ["--tasks", task, "--include_path", str(folder), "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out"), "--verbosity", "DEBUG"]  # otherwise it hides errors
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.fixture
def adapter(tiny, monkeypatch):
    """Our model for lmms-eval, without lmms-eval."""
    for name, value in (("lmms_eval.api.model", "lmms"), ("lmms_eval.models.registry_v2", "ModelManifest")):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{value: object}))
    name = "flash_vstream.evaluate.lmms"
    monkeypatch.setitem(sys.modules, name, None)  # what is imported now is forgotten afterwards
    del sys.modules[name]
    made = object.__new__(importlib.import_module(name).FlashVStreamLmms)
    made._pipeline, made._read = FlashVStream(*tiny), None
    return made


def test_pictures_are_read_once_and_kept_as_long_as_they_are_known(adapter):
    picture = Image.new("RGB", (32, 32))
    prefix, kept = adapter._prefix([[picture]]), weakref.ref(picture)
    assert adapter._prefix([[picture]]) is prefix
    del picture
    gc.collect()
    assert kept() is not None  # otherwise the next picture may get its id, and be taken for it


def test_an_answer_ends_before_the_first_of_its_stops(adapter, monkeypatch):
    answer = SimpleNamespace(finish=lambda: SimpleNamespace(text=" A dog. It runs.\n\nQ: "))
    monkeypatch.setattr(adapter._pipeline, "ask", lambda *_, **__: answer)
    texts = [adapter._answer([], "what?", {"until": until}) for until in ("It", ["\n\n", "."], [""], None)]
    assert texts == ["A dog.", "A dog", "A dog. It runs.\n\nQ:", "A dog. It runs.\n\nQ:"]


@pytest.mark.slow
def test_lmms_eval_runs_one_of_its_tasks(python, tasks, tiny_folder, tmp_path):
    answered = run_task(python, "videomme_here", tasks, tiny_folder, tmp_path)
    assert len(answered) == 4
    assert all(row["filtered_resps"] for row in answered)
    assert "videomme_perception_score" in next((tmp_path / "out").rglob("*results*.json")).read_text()


@pytest.mark.slow
def test_lmms_eval_runs_its_streaming_task(python, tiny_folder, tmp_path):
    """OVO-Bench's forward part: the same question again and again, about a longer video each time."""
    folder, videos = tmp_path / "tasks", tmp_path / "videos"
    folder.mkdir()
    videos.mkdir()
    source = package_of(python) / "tasks" / "ovobench"
    task = (source / "ovo_forward.yaml").read_text().replace("kcz358/OVOBench", str(tmp_path / "annotations"))
    task = task.replace("dataset_name: forward\n", "").replace('"ovo_forward"', '"ovo_forward_here"')
    (folder / "ovo_forward.yaml").write_text(task.replace("data_dir: null", f"data_dir: {videos}"))
    shutil.copy(source / "utils.py", folder / "utils.py")
    for i in range(3):
        write_video(videos / f"7_{i}.mp4", frames=10 + 10 * i)
    tests = [{"realtime": i + 1, "count": i} for i in range(3)]
    (tmp_path / "annotations").mkdir()
    row = {"id": 7, "task": "REC", "video": "x.mp4", "activity": "clap", "answer": "", "test_info": tests}
    (tmp_path / "annotations" / "test.jsonl").write_text(json.dumps(row) + "\n")
    (answered,) = run_task(python, "ovo_forward_here", folder, tiny_folder, tmp_path)
    assert len(answered["filtered_resps"]) == 3


TOTALS = """
import json, random, sys
from lmms_eval.tasks.mlvu.utils import mlvu_aggregate_results_dev
from lmms_eval.tasks.mvbench.utils import mvbench_aggregate_results
from lmms_eval.tasks.ovobench.score_utils.score import calculate_score_backward_realtime, calculate_score_forward
from lmms_eval.tasks.videomme.utils import videomme_aggregate_results
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.judges import OfflineJudge
from flash_vstream.evaluate.report import judged, summary

rng = random.Random(0)
LETTERS = "ABCD"

def ours(name, rows):
    return summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARKS[name])

def choice(i, kind):
    truth, chosen = rng.randrange(4), rng.randrange(4)
    row = {"id": str(i), "video": str(i % 9), "kind": kind, "choices": list(LETTERS), "answer": LETTERS[truth]}
    return {**row, "correct": truth, "chosen": chosen, "prediction": LETTERS[chosen], "error": None, "run": {}}

def compare(name, theirs, mine):
    assert abs(theirs - 100 * mine) < 1e-9, (name, theirs, mine)

kinds = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
rows = [choice(i, rng.choice(kinds)) for i in range(300)]
theirs = mlvu_aggregate_results_dev(
    [{"task_type": r["kind"], "pred_answer": r["prediction"], "answer": r["answer"]} for r in rows])
compare("mlvu", theirs, ours("mlvu", rows)["accuracy"])

theirs = mvbench_aggregate_results(
    [{"pred_answer": r["prediction"], "score": int(r["prediction"] == r["answer"])} for r in rows])
compare("mvbench", theirs, ours("mvbench", rows)["accuracy"])

rows = [choice(i, rng.choice(("short", "medium", "long"))) for i in range(300)]
theirs = videomme_aggregate_results([
    {"duration": r["kind"], "category": "Knowledge", "sub_category": "Law", "task_category": "OCR Problems",
     "pred_answer": r["prediction"], "answer": r["answer"]} for r in rows])
compare("videomme", theirs, ours("videomme", rows)["accuracy"])

def mean(scores):
    return 100 * sum(sum(v) / len(v) for v in scores.values()) / len(scores)

parts = {"backward tracing": ("EPM", "ASI", "HLD"), "real-time perception": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR")}
every, means = [], []
for part, tasks in parts.items():
    rows = [choice(1000 * len(every) + i, rng.choice(tasks)) for i in range(200)]
    every += rows
    results = [{"task": r["kind"], "response": r["prediction"], "ground_truth": r["answer"]} for r in rows]
    means.append(mean(calculate_score_backward_realtime(results)[1]))
    compare(part, means[-1], ours("ovobench", rows)["categories"][part]["accuracy"])

replies = ("Yes", "No", "Yes.", "No, not yet", "Y", "N", "maybe", "3", "12 times", "1 or 2", "0")
documents, rows = [], []
for i in range(120):
    task = rng.choice(("REC", "SSR", "CRR"))
    tests = [{"count": rng.randrange(4), "type": rng.randrange(2), "response": rng.choice(replies)} for _ in range(3)]
    documents.append({"task": task, "test_info": tests})
    for j, test in enumerate(tests):
        answer = str(test["count"]) if task == "REC" else ("No", "Yes")[test["type"]]
        row = {"id": f"f{i}_{j}", "video": str(i % 9), "kind": task, "choices": [], "answer": answer, "error": None}
        row |= {"scoring": "count" if task == "REC" else "yes/no", "prediction": test["response"], "run": {}}
        rows.append(row)
means.append(mean(calculate_score_forward(documents)[1]))
compare("forward", means[-1], ours("ovobench", rows)["categories"]["forward responding"]["accuracy"])
compare("ovobench", sum(means) / 3, ours("ovobench", every + rows)["accuracy"])
print("the same")
"""


@pytest.mark.slow
def test_totals_are_those_of_lmms_evals_aggregation(python, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", TOTALS], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("the same"), done.stdout[-2000:] + done.stderr[-4000:]
