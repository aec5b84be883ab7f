"""Export a trained adapter for release: bfloat16 safetensors and a card with their SHA-256."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.files import file_sha256
from flash_vstream.models.adapters import ADAPTER_CONFIG, BASE, name_base, read_adapter_settings
from flash_vstream.models.catalog import NANO_BASE, model_folder
from flash_vstream.models.small_networks import files_in

WEIGHTS = "adapter_model.safetensors"


def load_adapter(result: Path) -> dict[str, Tensor]:
    """Load the weights of a stage's adapter. Raises ``UserError`` when the folder holds none."""
    if not (result / WEIGHTS).exists():
        raise UserError(f"{result} holds no adapter ({WEIGHTS}); name the result folder of a stage that trains a LoRA")
    return load_file(result / WEIGHTS)


def export_adapter(result: Path, output: Path) -> dict[str, Any]:
    """Write ``result``'s adapter to ``output`` and return its card."""
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in load_adapter(result).items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file(state, output / WEIGHTS, metadata={"format": "pt"})
    for name in files_in(result):
        shutil.copyfile(result / name, output / name)
    base = read_adapter_settings(result)[BASE] or ""
    shutil.copyfile(result / ADAPTER_CONFIG, output / ADAPTER_CONFIG)
    # Not the folder that a named model has on the machine that trained it.
    name_base(output, NANO_BASE if Path(base) == model_folder(NANO_BASE) else base)
    state_file = result.parent / "trainer_state.json"
    steps = json.loads(state_file.read_text())["global_step"] if state_file.exists() else None
    files = [WEIGHTS, *(name for name in files_in(output) if name.endswith(".safetensors"))]
    card = {
        "sha256": {name: file_sha256(output / name) for name in files},
        "bytes": sum((output / name).stat().st_size for name in files),
        "steps": steps,
    }
    (output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
