"""LoRA adapters: what one was trained for, and merging it into the model that it was trained from."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flash_vstream.errors import UserError
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.small_networks import add_configs, load_networks

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """An adapter's PEFT settings. Raises ``UserError`` when the folder holds none."""
    try:
        settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
        rank, base = settings["r"], settings[BASE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no LoRA adapter ({ADAPTER_CONFIG}: {error})") from None
    if not isinstance(rank, int) or not isinstance(base, str | None):
        raise UserError(f"{folder} holds no LoRA adapter ({ADAPTER_CONFIG} names neither its rank nor its base)")
    return settings


def name_base(folder: Path, base: str) -> None:
    """Name the model that an adapter was trained from: a model's name, a hub id or a folder."""
    settings = read_adapter_settings(folder) | {BASE: base}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def merge_adapter(base: Path, adapter: Path, output: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in ``base`` to ``output``, with ``adapter`` and its small networks merged in.

    The processor is not written. The sum is taken in float32. Raises ``UserError`` when the adapter does not fit the
    model.
    """
    from peft import PeftModel  # slow to import

    config = FlashVStreamConfig.from_pretrained(base)
    add_configs(config, adapter)
    model = FlashVStreamForConditionalGeneration.from_pretrained(base, config=config, dtype=torch.float32)
    load_networks(model, adapter)
    try:
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(f"the adapter in {adapter} does not fit {base} ({str(error).splitlines()[0]})") from None
    merged.to(dtype).save_pretrained(output)
