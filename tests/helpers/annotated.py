"""Annotated pictures that tell what is in them, and a tiny model with nano's kind of tower."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flash_vstream.models import (
    EfficientNetLiteConfig,
    FlashVStreamConfig,
    FlashVStreamForConditionalGeneration,
    FlashVStreamProcessor,
    FrameProcessor,
)

TRAIN, VAL = 24, 8


def annotated_pictures(folder: Path) -> Path:
    """Write a set of pictures, every other one bright, with somebody and a ball in it."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{i:02}.png" for i in range(TRAIN + VAL)]
    for i, key in enumerate(keys):
        level = 200 if i % 2 else 20
        Image.new("RGB", (32, 32), (level + i, level + 20, level + 2 * (i % 6))).save(folder / key)
    captions = {key: [f"a dog number {i} runs", f"the dog {i} is outside"] for i, key in enumerate(keys)}
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "splits.json").write_text(json.dumps({"train": keys[:TRAIN], "val": keys[TRAIN:]}))
    rows = [_annotation(i, key) for i, key in enumerate(keys)]
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _annotation(number: int, key: str) -> dict[str, object]:
    somebody = number % 2
    return {
        "image": key,
        "caption": f"a dog number {number} runs",
        "short": "a dog outside",
        "place": "park",
        "people": somebody,
        "objects": ["brown dog", "2 green trees", *["red ball"] * somebody],
        "qa": [["What animal is this?", "A dog."], ["What color is the dog?", "Brown."]],
    }


def nano_like(model: Any, processor: Any, folder: Path) -> None:
    """Save a tiny model with nano's kind of vision tower, with grounding and time stamps."""
    lengths = {"temporal_length": 4, "abstract_length": 2, "retrieved_length": 1}
    settings = {
        **model.config.to_dict(),
        "vision_config": EfficientNetLiteConfig(image_size=64, hidden_size=32, width=0.25),
        "vision_feature_layer": None,
        "vision_has_class_token": False,
        "pooled_size": 2,
        "grounding_config": {"width": 16, "members": 2, "common": 4},
        "time_stamps": True,
        "memory_config": {"spatial_size": 2, "temporal_size": 1, **lengths},
    }
    torch.manual_seed(0)
    made = FlashVStreamForConditionalGeneration(FlashVStreamConfig(**settings))
    for module in made.vision_tower.modules():
        if isinstance(module, torch.nn.Conv2d):  # with Transformers' small weights, nothing would reach the last blocks
            torch.nn.init.kaiming_normal_(module.weight)
    made.language_model.load_state_dict(model.language_model.state_dict())
    made.save_pretrained(folder)
    frames = FrameProcessor(64, [0.5] * 3, [0.5] * 3)
    template = processor.prompt_template
    FlashVStreamProcessor(frames, processor.tokenizer, template, time_stamps=True).save_pretrained(folder)
