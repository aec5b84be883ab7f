"""The command line as a process: imports, closed pipes, Ctrl-C, unusual terminals and questions."""

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from helpers.cli import run
from helpers.videos import write_video

COMMAND = [sys.executable, "-m", "flash_vstream"]
SLOW = ("torch", "transformers", "numpy", "av", "PIL", "huggingface_hub", "fastapi", "uvicorn", "peft")


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["--version"], ["models"], ["models", "--json"]])
def test_what_needs_no_model_imports_nothing_slow(arguments):
    code = f"""
import sys
from flash_vstream.cli.main import main
sys.argv = ["flash-vstream", *{arguments!r}]
try:
    main()
finally:
    print(*sorted(set({SLOW!r}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("arguments", [["models", "--json"], ["--help"], ["models"]])
def test_a_reader_that_left_is_no_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_ctrl_c_during_a_fetch_ends_everything_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts the connection and never answers
        index.settimeout(240)
        environment = os.environ | {
            "FLASH_VSTREAM_CACHE": str(tmp_path / "cache"),
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        command = subprocess.Popen(
            [*COMMAND, "pull", "nano"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with command:
            connection, _ = index.accept()
            started = psutil.Process(command.pid).children(recursive=True)
            assert started
            command.send_signal(signal.SIGINT)
            out, err = command.communicate(timeout=120)
            connection.close()
    assert (command.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert psutil.wait_procs(started, timeout=60)[1] == []
    scratch = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]
    assert scratch == []


def test_a_terminal_that_cannot_show_a_letter_gets_its_code(tiny_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    command = [*COMMAND, "ask", str(video), "où est le chat 猫?", "--model", str(tiny_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert b"o\\xf9 est le chat \\u732b?" in done.stdout


@pytest.mark.parametrize(
    ("question", "message"),
    [("what\udcff?", "is not text in the terminal's encoding"), ("what? " * 20_000, "shorten it")],
)
def test_a_question_that_no_model_can_take_is_refused_before_watching(tiny_folder, tmp_path, question, message):
    video = write_video(tmp_path / "clip.mp4")
    done = run("ask", video, question, "--model", tiny_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def _text(path):
    path.write_text("not a video\n")
    return path


def _half_a_video(path):
    whole = write_video(path)
    whole.write_bytes(whole.read_bytes()[:200])
    return whole


@pytest.mark.parametrize(
    "medium",
    [_text, _half_a_video, lambda path: path.touch() or path, lambda path: path.mkdir() or path, lambda path: path],
    ids=["text", "half a video", "an empty file", "a folder", "nothing"],
)
def test_what_is_no_video_is_one_message(tiny_folder, tmp_path, medium):
    done = run("ask", medium(tmp_path / "clip.mp4"), "what?", "--model", tiny_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flash-vstream: ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback():
    code = """
import os, runpy, signal, sys

class Pressed:
    @staticmethod
    def find_spec(name, *_):
        if name == "flash_vstream.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
sys.meta_path.insert(0, Pressed)
runpy.run_module("flash_vstream", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
