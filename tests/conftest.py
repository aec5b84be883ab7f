"""Shared fixtures: golden tensors, the tiny published checkpoint, a character tokenizer, a browser."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from flash_vstream.models import hub
from flash_vstream.models.convert import convert_checkpoint
from flash_vstream.pipeline import FlashVStream
from flash_vstream.train.prepare import prepare
from helpers.alerts import Server as AlertServer
from helpers.annotated import nano_like
from helpers.environment import missing
from helpers.goldens import GOLDENS, load_goldens, write_tiny
from helpers.models import char_tokenizer


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start: a shell starts background commands with it ignored, which is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def goldens() -> dict[str, torch.Tensor]:
    """Tensors recorded from the released code."""
    return load_goldens(GOLDENS / "goldens.npz")


@pytest.fixture(scope="session")
def golden_notes() -> dict:
    """Non-tensor golden data: random draws, prompts, losses."""
    return json.loads((GOLDENS / "goldens.json").read_text())


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A tiny checkpoint in the authors' layout, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "vstream-tiny"
    write_tiny(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(published, tmp_path_factory) -> Path:
    """The tiny checkpoint converted to a model folder of this project."""
    folder = tmp_path_factory.mktemp("tiny")
    convert_checkpoint(str(published), folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """Model and processor of the tiny checkpoint, on the CPU in float32."""
    return hub.load(str(tiny_folder), "cpu", torch.float32)


@pytest.fixture(scope="session")
def quick_folder(tiny, tmp_path_factory) -> Path:
    """A tiny model with nano's kind of tower, which programs load in half the time: without Transformers."""
    folder = tmp_path_factory.mktemp("quick")
    nano_like(*tiny, folder)
    FlashVStream.for_answers(str(folder)).prepare_answers()  # keeps what the next start needs
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, tiny_folder) -> Path:
    """A captioned picture set, prepared with the tiny model."""
    source, output = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("prepared")
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 200, 0), "white": (255, 255, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (60, 40), colour).save(source / f"{name}.png")
    captions = {f"{name}.png": [f"all {name} .", f"it is {name}"] for name in colours}
    (source / "captions.json").write_text(json.dumps(captions))
    (source / "splits.json").write_text(json.dumps({"train": [f"{name}.png" for name in colours]}))
    prepare(source, output, str(tiny_folder))
    return output


@pytest.fixture
def open_server(tmp_path):
    """Opens servers' watches over one folder, and closes them at the end."""
    opened = []

    def start(**more) -> AlertServer:
        opened.append(AlertServer(tmp_path, **more))
        return opened[-1]

    yield start
    for server in opened:
        server.watches.close()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        missing("Chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        options.append("--host-resolver-rules=MAP cameras.test 127.0.0.1")  # an insecure origin
        running = playwright.chromium.launch(executable_path=chromium, args=options)
        yield running
        running.close()


@pytest.fixture(autouse=True)
def _no_handler_of_ended_children():
    # PyTorch's data loader leaves one behind, and every program that a later test starts and ends would run it.
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture(autouse=True)
def _few_threads():
    # Threads of two test processes on two cores would wait for each other.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
