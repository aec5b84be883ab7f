"""scripts/train_nano.sh at toy size: every step of nano's training, then the same command again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flash_vstream.models import FlashVStreamForConditionalGeneration

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_nano.sh"


@pytest.fixture
def toy(tiny, tmp_path) -> tuple[Path, Path]:
    """A folder of 24 captioned pictures, and the tiny model with an untrained grounding."""
    pictures, folder = tmp_path / "pictures", tmp_path / "model"
    pictures.mkdir()
    keys = [f"{i:02}.png" for i in range(28)]
    for i, key in enumerate(keys):
        Image.new("RGB", (32, 32), (9 * i, 255 - 9 * i, 40 * (i % 6))).save(pictures / key)
    captions = {key: [f"a dog number {i} runs", f"the dog {i} is outside"] for i, key in enumerate(keys)}
    (pictures / "captions.json").write_text(json.dumps(captions))
    (pictures / "splits.json").write_text(json.dumps({"train": keys[:24], "val": keys[24:]}))
    model, processor = tiny
    settings = {"grounding_config": {"width": 16, "members": 2}, "time_stamps": True}
    lengths = {"temporal_length": 4, "abstract_length": 2, "retrieved_length": 1}
    settings["memory_config"] = {"spatial_size": 2, "temporal_size": 1, **lengths}
    config = FlashVStreamForConditionalGeneration.config_class(**{**model.config.to_dict(), **settings})
    torch.manual_seed(0)
    made = FlashVStreamForConditionalGeneration(config)
    made.load_state_dict(model.state_dict(), strict=False)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return pictures, folder


def train(pictures: Path, output: Path, *options: str | Path) -> subprocess.CompletedProcess:
    command = output.parent / "flash-vstream"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flash_vstream "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "FLASH_VSTREAM": str(command), "OMP_NUM_THREADS": "1"}
    arguments = [str(SCRIPT), str(pictures), str(output), *map(str, options)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_every_step_runs_and_finished_ones_are_not_repeated(toy, tmp_path):
    pictures, model = toy
    output = tmp_path / "out"
    done = train(pictures, output, "--tiny", model)
    assert done.returncode == 0, done.stderr[-4000:]
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and value.any() for name, value in weights.items())
    assert (output / "adapter" / "grounding.safetensors").exists()
    again = train(pictures, output, "--tiny", model)
    assert again.returncode == 0
    assert again.stderr.count("is finished") == 10


@pytest.mark.parametrize("arguments", [["/none"], ["--tiny"], ["--what", "x"]])
def test_a_wrong_call_says_what_is_wanted(arguments):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "captions.json" in done.stderr
