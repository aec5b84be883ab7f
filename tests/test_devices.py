"""What breaks on a GPU, caught without one: on PyTorch's meta device, whose tensors mix with no others."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from flash_vstream.bench import gpu
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.memory import StarConfig, star
from flash_vstream.memory.release import ReleaseMemory
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.choice import ModelChoice
from flash_vstream.pipeline import FlashVStream
from flash_vstream.train import media
from helpers.cli import run
from helpers.vlms import TINY_STAR, tiny_pair, tiny_vlm


@pytest.fixture(scope="module")
def elsewhere(tiny_folder) -> FlashVStreamForConditionalGeneration:
    """The tiny model on another device than the CPU."""
    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    nn.Module.to(model, "meta")
    return model


def devices(memory) -> set[str]:
    return {value.device.type for value in memory.state_dict().values() if value.ndim > 2}


def test_a_memory_that_is_evaluated_is_where_the_model_is(elsewhere):
    method = MemoryMethod("star", elsewhere)
    assert devices(method._memory) == {"meta"}
    assert {parameter.device.type for parameter in method._memory.attention.parameters()} == {"meta"}


SIZES = [None, StarConfig(compat="release"), StarConfig(temporal_length=0, retrieved_length=0)]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_new_memory_is_where_the_model_is(elsewhere, sizes):
    assert devices(elsewhere.new_memory(star=sizes)) == {"meta"}


def test_every_frame_is_read_where_its_features_are(elsewhere, monkeypatch):
    def unchecked(features, times, **_):  # the meta device has no values to check
        return features, torch.as_tensor(times, dtype=torch.float64)

    monkeypatch.setattr(star, "checked_frames", unchecked)
    features = torch.zeros(3, *elsewhere.feature_shape, device="meta")
    snapshot = elsewhere.snapshot_of(features, [0.0, 1.0, 2.0], every=True)
    assert snapshot.tokens().device.type == "meta"
    assert snapshot.spatial.start.tolist() == [0.0, 1.0, 2.0]


def test_a_text_image_pair_sees_where_it_is(tmp_path):
    folder, pair = tiny_vlm("internvl", tmp_path / "model"), tiny_pair(tmp_path / "pair")
    choice = ModelChoice(str(folder), "cpu", "float32", star=TINY_STAR, pair=str(pair))
    model = FlashVStream.from_pretrained(choice).model.to("meta")
    assert model.encode(torch.zeros(2, 3, 64, 64)).device.type == "meta"


class Elsewhere(torch.Tensor):
    """A tensor that says when it is copied to the CPU."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_features_for_training_are_on_the_cpu(monkeypatch, tmp_path):
    class Pipeline:
        def encode_file(self, path):
            yield [0.0, 1.0], torch.ones(2, 4, 8).as_subclass(Elsewhere)

    monkeypatch.setattr(media, "_vision", lambda folder: Pipeline())
    features, times = media.media_encoder(tmp_path)(tmp_path / "clip.mp4")
    assert type(features) is torch.Tensor
    assert times.tolist() == [0.0, 1.0]


def test_the_released_memory_is_evaluated_in_its_form_for_whole_videos(tiny_folder, tmp_path):
    pipeline = FlashVStream.from_pretrained(ModelChoice(str(tiny_folder), "cpu", "float32", compat="release"))
    method = MemoryMethod("star", pipeline.model)
    assert isinstance(method._memory, ReleaseMemory)
    frames = pipeline.encode(np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), dtype=np.uint8))
    for second, feature in enumerate(frames):
        method.write(float(second), feature)
    whole = ReleaseMemory(pipeline.model.config.star, 32, pipeline.model.semantic_attention, offline=True)
    whole.write(frames, list(range(30)))
    torch.manual_seed(0)
    ours = method.snapshot()
    torch.manual_seed(0)
    assert torch.equal(ours.tokens(), whole.read().tokens())


def test_the_gpu_bench_runs_on_a_cpu_at_tiny_sizes():
    done = run("bench", "gpu", "--model", "tiny", "--device", "cpu", "--frames", "10")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["gpu"]
    assert [(row["memory"], row["frames"]) for row in rows] == [
        (memory, count) for memory in ("star", "release") for count in (1, 10)
    ]
    assert all(row["measured"] for row in rows)
    ours, released = rows[:2], rows[2:]
    assert len({row["memory_bytes"] for row in ours}) == 1
    assert released[1]["memory_bytes"] > 5 * released[0]["memory_bytes"]


@pytest.mark.parametrize("arguments", [["--model", "tiny"], ["--model", "giant", "--device", "cpu"]])
def test_the_gpu_bench_says_what_is_missing(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("bench", "gpu", *arguments)
    assert done.returncode == 2
    assert "tiny" in done.stderr


BILLIONS = {
    "flash-vstream-7b": (6.9, 7.2),
    "flash-vstream-qwen-7b": (8.2, 8.4),
    "qwen3-vl-4b": (4.3, 5),
    "tiny": (0, 1),
}


def test_the_sizes_of_the_real_models_can_be_built():
    for name, sizes in gpu.SIZES.items():
        with torch.device("meta"):
            model, processor = sizes.build()
        billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        low, high = {
            "flash-vstream-7b": (6.9, 7.2),
            "flash-vstream-qwen-7b": (8.2, 8.4),
            "qwen3-vl-4b": (4.3, 5.0),
        }.get(name, (0, 0.1))
        assert low < billions < high, name
        assert processor.longest_layout(model.config) > model.config.star.max_tokens
