"""Encode the images and videos of a training set whose features were not precomputed."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig

from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration
from flash_vstream.models.hub import load_processor
from flash_vstream.models.precision import best_dtype
from flash_vstream.models.small_networks import SMALL_NETWORKS
from flash_vstream.pipeline import FlashVStream

_NO_LANGUAGE: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def media_encoder(model_folder: Path) -> Callable[[Path], tuple[Tensor, Tensor]]:
    """Return a function from an image, video or stored features to features ``[T, P², D]`` and times ``[T]``.

    It loads the model's vision tower on its first call, but not the language model, on a GPU unless it is
    called by a worker of a data loader. It raises ``UserError`` for unreadable media.
    """
    pipeline = lru_cache(maxsize=1)(lambda: _vision(model_folder))

    def encode(path: Path) -> tuple[Tensor, Tensor]:
        times, features = zip(*pipeline().encode_file(path), strict=True)
        # On the CPU, wherever the model is: a data loader pins what it is given.
        return torch.cat(features).cpu(), torch.tensor([time for part in times for time in part], dtype=torch.float64)

    return encode


def _vision(folder: Path) -> FlashVStream:
    """A pipeline with the vision tower in ``folder`` and a language model of no use."""
    config, processor = load_processor(str(folder))
    text = LlamaConfig(**_NO_LANGUAGE, num_attention_heads=1)
    without = {f"{name}_config": None for name in SMALL_NETWORKS}
    values = {**config.to_dict(), "text_config": text, **without}
    model = FlashVStreamForConditionalGeneration(FlashVStreamConfig(**values))
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part, _, rest = name.partition(".")
                if part == "vision_tower":
                    state[rest] = file.get_tensor(name)
    model.vision_tower.load_state_dict(state)
    in_worker = torch.utils.data.get_worker_info() is not None
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() and not in_worker else "cpu"
    nn.Module.to(model, device, best_dtype(device.partition(":")[0]))
    return FlashVStream(model.train(False), processor)
