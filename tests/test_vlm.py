"""Transformers' vision-language models behind the memory: tiny ones of every family, with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.interface import VIDEO_TOKEN
from flash_vstream.models.vlm_families import NEWLINE_TOKEN
from flash_vstream.pipeline import FlashVStream, Stream
from helpers.vlms import CONFIGS, TINY_STAR, tiny_vlm

QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny_vlm(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(scope="module")
def pipelines(folders) -> dict[str, FlashVStream]:
    return {name: load(folder) for name, folder in folders.items()}


def load(folder: Path, **options) -> FlashVStream:
    choice = ModelChoice(str(folder), device="cpu", dtype="float32", **{"star": TINY_STAR, **options})
    return FlashVStream.from_pretrained(choice)


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)


def watched(pipeline: FlashVStream, count: int = 10) -> Stream:
    stream = pipeline.new_stream()
    for second, frame in enumerate(frames(count)):
        stream.write([frame], [float(second)])
    return stream


def native_inputs(name: str, pipeline: FlashVStream, ids: list[int], shown: np.ndarray) -> dict:
    """What Transformers' own forward takes for a prompt of ours with these frames."""
    config = pipeline.model.network.config
    token = config.video_token_id if name == "llava_onevision" else config.image_token_id
    places = torch.tensor([ids])
    places = torch.where((places == VIDEO_TOKEN) | (places == NEWLINE_TOKEN), token, places)
    processor = pipeline.processor.image_processor
    pixels = processor.pixels(np.stack([processor.square(frame) for frame in shown]))
    if name.startswith("qwen"):
        patches, grid = pipeline.model.family._grid(pixels)
        kinds = (places == token).int()
        return {"input_ids": places, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name == "llava_onevision":
        return {"input_ids": places, "pixel_values_videos": pixels[:, None]}
    if name == "smolvlm":
        return {"input_ids": places, "pixel_values": pixels[None]}
    if name == "gemma3":
        return {"input_ids": places, "pixel_values": pixels, "token_type_ids": (places == token).long()}
    return {"input_ids": places, "pixel_values": pixels}


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_frames_as_transformers_does(pipelines, name):
    pipeline, shown = pipelines[name], frames(2)
    stream = watched(pipeline, 2)
    prefix = pipeline.generator.read(stream.snapshot())
    question = pipeline.processor.question_ids(QUESTION)
    ids = [*prefix.ids, *question]
    with torch.inference_mode():
        ours = pipeline.model(torch.tensor([question]), past_key_values=prefix.cache).logits[0, -1]
        native = pipeline.model.network(**native_inputs(name, pipeline, ids, shown)).logits[0, -1]
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4 * float(native.abs().max()))
