"""What breaks on a GPU, caught without one: on PyTorch's meta device, whose tensors mix with no others."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flash_vstream.bench import gpu
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.memory import StarConfig, StarMemory, star
from flash_vstream.memory.attention import SemanticAttention
from flash_vstream.memory.flash import FlashMemory
from flash_vstream.memory.flash_release import ReleaseFlashMemory
from flash_vstream.memory.release import ReleaseMemory
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.vlm import default_star
from flash_vstream.pipeline import FlashVStream
from flash_vstream.train import media
from helpers.cli import run
from helpers.far_device import FAR, FarMode, far
from helpers.vlms import TINY_STAR, tiny_pair, tiny_vlm

ROOT = Path(__file__).parent.parent


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


NO_FFMPEG = """
import runpy, sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("av", "openvino", "fastapi", "uvicorn", "gguf", "platformdirs", "prompt_toolkit"):
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Missing())
runpy.run_module("flash_vstream", run_name="__main__")
"""


def test_the_gpu_bench_runs_on_a_cpu_at_tiny_sizes_and_needs_few_packages(tmp_path):
    plot = tmp_path / "gpu.png"
    arguments = ["bench", "gpu", "--model", "tiny", "--device", "cpu", "--frames", "10", "--output", str(plot)]
    done = subprocess.run([sys.executable, "-c", NO_FFMPEG, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["gpu"]
    cases = [("tiny", "star"), ("tiny", "release"), ("tiny-qwen", "star"), ("tiny-qwen", "release")]
    assert [(row["model"], row["memory"], row["frames"]) for row in rows] == [
        (*case, count) for case in [*cases, ("tiny-qwen3-vl", "star")] for count in (1, 10)
    ]
    assert all(row["measured"] for row in rows)
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert told == rows
    for ours, released in ((rows[0:2], rows[2:4]), (rows[4:6], rows[6:8])):
        assert len({row["memory_bytes"] for row in ours}) == 1
        assert released[1]["memory_bytes"] > 5 * released[0]["memory_bytes"]
    assert plot.stat().st_size > 10_000


def test_the_far_device_mixes_with_no_other():
    with FarMode():
        there, here = torch.ones(3, device=FAR), torch.ones(3)
        assert there.near.tolist() == [1.0, 1.0, 1.0]
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="indices"):
            here[torch.tensor([0], device=FAR)]
        assert (there[torch.tensor([0])].cpu() + here).tolist() == [2.0, 2.0, 2.0]


FLASH = {"temporal_length": 8, "retrieved_length": 4, "spatial_length": 0, "abstract_length": 0, "abstract_size": 1}
FLASH |= {"spatial_size": 4, "temporal_size": 2}
VLM = replace(default_star(4), longterm_length=12)
SMALL = {"spatial_size": 4, "temporal_size": 2, "temporal_length": 8, "abstract_length": 8, "buffer_length": 16}
MEMORIES = {
    "vlm": lambda *to: StarMemory(VLM, 40, None, *to),
    "paper": lambda *to: StarMemory(replace(StarConfig.paper(), **SMALL), 40, far_attention(to[0]), *to),
    "release": lambda *to: ReleaseMemory(StarConfig(**SMALL, compat="release"), 40, far_attention(to[0]), *to),
    "flash": lambda *to: FlashMemory(StarConfig(**FLASH), 40, None, *to),
    "flash, release": lambda *to: ReleaseFlashMemory(StarConfig(**FLASH, compat="release"), 40, *to),
    "flash, release, whole": lambda *to: ReleaseFlashMemory(StarConfig(**FLASH, compat="release"), 40, *to, True),
}


def far_attention(dtype: torch.dtype) -> SemanticAttention:
    attention = SemanticAttention(40, 8).to(dtype)
    for module in (attention.q_proj, attention.k_proj):
        for name, value in list(module.named_parameters()):
            delattr(module, name)
            setattr(module, name, far(value))
    return attention


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_works_on_a_far_device_in_half_precision(kind):
    frames = torch.randn(30, 16, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.manual_seed(0)  # the attention's weights, and where the released code's k-means starts
    with torch.no_grad(), FarMode():
        memory = MEMORIES[kind](torch.bfloat16, FAR)
        for second, frame in enumerate(frames):
            memory.write(far(frame[None]), [float(second)])
        there = memory.read()
        tokens = there.tokens()
    assert tokens.device.type == FAR
    assert there.temporal.mean.device.type == "cpu"
    assert tokens.near.float().isfinite().all()
    assert there.frames == 30


FAR_BENCH = """
import sys, torch
sys.path.insert(0, "tests")
torch.inference_mode = lambda mode=True: torch.no_grad()  # the far device's tensors have no versions
torch.__future__.set_overwrite_module_params_on_conversion(True)
from flash_vstream.bench import gpu
from helpers.far_device import FarMode, far
here = gpu._built
def there(sizes, device, dtype):
    pipeline = here(sizes, "cpu", dtype)
    pipeline.model._apply(far)
    return pipeline
gpu._built, gpu.COUNTS = there, (3,)
with FarMode():
    for name in ("tiny", "tiny-qwen", "tiny-qwen3-vl"):
        assert all(row["measured"] for row in gpu.bench_sizes(name, 10, "far", torch.bfloat16))
"""


def test_models_read_and_answer_on_a_far_device_in_half_precision():
    done = subprocess.run([sys.executable, "-c", FAR_BENCH], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--model", "tiny"], ["--model", "giant", "--device", "cpu"]])
def test_the_gpu_bench_says_what_is_missing(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("bench", "gpu", *arguments)
    assert done.returncode == 2
    assert "tiny" in done.stderr


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
