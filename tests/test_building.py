"""vstream-qa build: every step against real endpoints, with a capable model and one like nano."""

import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.generation import KINDS, Building, filter_by_rules, read_questions, segments
from flash_vstream.evaluate.loading import load_items
from flash_vstream.video import Frame
from helpers.cli import run
from helpers.server import serving
from helpers.videos import write_video


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "kitchen.mp4", frames=40, rate=2)


def question(kind=KINDS[0], text="What is on the table?", answer="A box.", **more):
    return {"kind": kind, "question": text, "answer": answer, "status": "new", "why": None, **more}


class Teacher(http.server.BaseHTTPRequestHandler):
    """A model that follows instructions, and fails permanently after ``patience`` replies."""

    patience = 10**9
    replies = 0

    def do_POST(self) -> None:
        cls = type(self)
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if cls.replies >= cls.patience:
            self.send_error(400)
            return
        cls.replies += 1
        system = request["messages"][0]["content"]
        said = "A table with a box."
        if "JSON list" in system:
            rows = [
                {"kind": KINDS[0], "question": f"What is on the table number {cls.replies}?", "answer": "A box."},
                {"kind": KINDS[2], "question": f"Did somebody open box {cls.replies}?", "answer": "No."},
                {"kind": KINDS[3], "question": "What do the notes say?", "answer": "Nothing."},
            ]
            said = "Here you are: " + json.dumps(rows)
        elif "yes or no" in system:
            said = "Yes."
        body = {"choices": [{"message": {"content": said}}], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def teacher():
    handler = type("Pupil", (Teacher,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_segments_end_at_cuts_and_are_neither_short_nor_long():
    dark, light = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    frames = [Frame(float(i), light if 20 <= i < 23 or i >= 40 else dark) for i in range(150)]
    found = segments(iter(frames))
    assert [(part["start"], part["end"]) for part in found] == [(0, 19), (20, 39), (40, 99), (100, 149)]
    assert all(1 <= len(part["pictures"]) <= 4 for part in found)


def test_frames_of_earlier_segments_are_not_kept():
    seen, alive = [], []

    def frames():
        for second in range(300):
            image = np.zeros((32, 32, 3), np.uint8)
            seen.append(weakref.ref(image))
            yield Frame(float(second), image)
            alive.append(sum(ref() is not None for ref in seen))

    assert len(segments(frames())) == 5
    assert max(alive) < 70


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        ('[{"kind": "x", "question": "y?", "answer": "z"}]', 1),
        ('Sure!\n```json\n[{"kind": "x", "question": "y?", "answer": "z"}, {"kind": 1}]\n```', 1),
        ("[]", 0),
        ("I cannot.", None),
        ("[{]", None),
        ('{"kind": "x"}', None),
    ],
)
def test_replies_are_read(reply, count):
    found = read_questions(reply)
    assert (found if found is None else len(found)) == count


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (question(kind="trivia"), "five kinds"),
        (question(text="Tell me."), "not a question"),
        (question(answer=""), "empty"),
        (question(text="What do the notes say here?"), "notes"),
        (question(answer="At 12 s."), "times"),
        (question(KINDS[2], "Did somebody open it?", "A box."), "yes or no"),
    ],
)
def test_rules_drop_what_breaks_them(bad, why):
    rows = [question(), bad]
    filter_by_rules(rows)
    assert rows[0]["status"] == "new"
    assert rows[1]["status"] == "dropped"
    assert why in rows[1]["why"]


def test_doubles_and_too_many_a_yes_are_dropped():
    rows = [question(), question(text="what is on the table ?")]
    rows += [question(KINDS[2], f"Is thing {i} there?", "Yes.") for i in range(4)]
    filter_by_rules(rows)
    assert [row["status"] for row in rows] == ["new", "dropped", "new", "new", "dropped", "dropped"]


class Doubting:
    """An endpoint that asks ten questions to be answered by yes or no, and finds two answers wrong.

    It does not answer any more after ``patience`` replies.
    """

    def __init__(self, patience=10**9):
        self.patience = patience

    def complete(self, system, user, limit=0):
        self.patience -= 1
        if self.patience < 0:
            raise UserError("the model did not answer")
        if "JSON list" in system:
            answers = ("Yes.", "Yes.", "No.", "Yes.", "No.", "No.", "No.", "Yes.", "No.", "No.")
            texts = [f"Did somebody open box number {i}?" for i in range(len(answers))]
            rows = [{"kind": KINDS[2], "question": q, "answer": a} for q, a in zip(texts, answers, strict=True)]
            return json.dumps(rows), {}
        return ("No." if "number 1?" in user or "number 4?" in user else "Yes."), {}


@pytest.mark.parametrize("patience", [2, 5, 8])
def test_a_resumed_build_keeps_the_same_questions(video, tmp_path, patience):
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(UserError, match="did not answer"):
        Building(video, folders[1], Doubting(patience)).run(str)
    built = [Building(video, folder, Doubting()) for folder in folders]
    for building in built:
        building.run(str)
    assert built[0].record["questions"] == built[1].record["questions"]


def test_a_benchmark_is_built_resumed_and_exported(video, teacher, tmp_path):
    url, handler = teacher
    output = tmp_path / "made"
    handler.patience = 4  # the model disappears halfway through
    command = ("vstream-qa", "build", video, "--llm", url, "--llm-model", "teacher", "--output", output, "--json")
    stopped = run(*command)
    assert stopped.returncode == 2
    assert "did not answer" in stopped.stderr
    handler.patience = 10**9
    done = run(*command)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert report["cost"]["calls"] == handler.replies  # no request is repeated
    assert report["cost"]["completion_tokens"] == 5 * handler.replies
    assert report["questions"]["new"] >= 2
    assert "it speaks of notes or times" in report["dropped"]
    again = handler.replies
    assert run(*command).returncode == 0
    assert handler.replies == again
    assert run("vstream-qa", "export", output, tmp_path / "rvs.json").returncode == 0
    items = load_items(BENCHMARKS["rvs-ego"], tmp_path / "rvs.json")
    assert len(items) == report["questions"]["new"]
    assert all(item.video == "kitchen" and item.end is not None for item in items)


def test_our_own_server_is_such_an_endpoint(quick_folder, video, tmp_path):
    """A model that knows nothing produces no questions; this is reported and nothing breaks."""
    model = tmp_path / "model"
    shutil.copytree(quick_folder, model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192  # its tokens are characters, and prompts are long
    (model / "config.json").write_text(json.dumps(config))
    with serving(str(model)) as server:
        command = ("vstream-qa", "build", video, "--llm", server.url, "--llm-model", str(model))
        done = run(*command, "--output", tmp_path / "made", "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert report["cost"]["calls"] >= 3
    assert report["cost"]["prompt_tokens"] > 0
    assert report["unreadable_replies"] == report["segments"]


@contextmanager
def reviewing(video: Path, llm: str, output: Path) -> Iterator[str]:
    """Build questions for a video and yield the URL of their review page."""
    run("vstream-qa", "build", video, "--llm", llm, "--llm-model", "teacher", "--output", output)
    command = [sys.executable, "-m", "flash_vstream", "vstream-qa", "review", str(output), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["listening"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_questions_are_reviewed_on_a_page(video, teacher, tmp_path):
    with reviewing(video, teacher[0], tmp_path / "made") as url:
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        assert re.search(r"<title>VStream-QA review</title>", page)
        body = json.dumps({"status": "kept", "question": "What lies there?", "answer": "A box."}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url + "records/kitchen/0", body, headers)
        assert json.load(urllib.request.urlopen(request, timeout=10))["status"] == "kept"
        (record,) = json.load(urllib.request.urlopen(url + "records", timeout=10))
        assert record["questions"][0]["question"] == "What lies there?"
        clip = urllib.request.Request(url + "clips/kitchen", headers={"range": "bytes=0-99"})
        assert urllib.request.urlopen(clip, timeout=10).status == 206


def test_people_keep_edit_and_drop_in_a_browser(teacher, tmp_path, browser):
    video = write_video(tmp_path / "kitchen.mp4", frames=40, rate=2, codec="libx264")
    with reviewing(video, teacher[0], tmp_path / "made") as url, browser.new_page() as page:
        page.goto(url)
        expect(page.locator("#progress")).to_have_text(re.compile(r"Question 1 of \d+"))
        page.wait_for_function("document.getElementById('clip').videoWidth > 0")
        page.fill("#question", "What lies there?")
        page.click("[data-status=kept]")
        expect(page.locator("#progress")).to_have_text(re.compile(r"Question 2 of"))
        page.locator("h1").click()
        page.keyboard.press("d")
        expect(page.locator("#progress")).to_have_text(re.compile(r"Question 3 of"))
        page.keyboard.press("p")
        expect(page.locator("#state")).to_have_text("dropped")
        page.fill("#answer", " ")
        page.click("[data-status=kept]")
        expect(page.locator("#why")).to_contain_text("not saved")
        first, second = json.loads((tmp_path / "made" / "kitchen.json").read_text())["questions"][:2]
        assert (first["status"], first["question"], second["status"]) == ("kept", "What lies there?", "dropped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "/none.mp4", "--llm", "http://x"), "no video"),
        (("build", "{video}", "--llm", "gpt"), "--llm"),
        (("build", "{video}", "{video}", "--llm", "http://x"), "two videos"),
        (("review", "/none"), "no records"),
        (("export", "/none", "/tmp/x.json"), "no records"),
    ],
)
def test_vstream_qa_says_what_is_wrong(video, arguments, message):
    done = run("vstream-qa", *(argument.replace("{video}", str(video)) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
