"""What was recorded from the released code: golden tensors, and the weights of its tiny models drawn again by seed."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDENS = Path(__file__).parent.parent / "goldens"
EVERY = 4
"""Of large results every fourth number of a row is kept; inputs are whole."""
_SPREADS = {"embed_tokens.weight": 0.5, "position_embedding.weight": 0.3}


def load_goldens(path: Path) -> dict[str, Tensor]:
    """Tensors by name; whole numbers are kept in 16 bits and come back as int64."""
    with np.load(path) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    return {name: value.long() if value.dtype == torch.int16 else value for name, value in tensors.items()}


def close(ours: Tensor, golden: Tensor, every: int = 1) -> None:
    """Assert that results agree to 1e-5; with ``every``, the golden one has only so many of a row's numbers."""
    ours = ours[..., ::every].to(golden)
    torch.testing.assert_close(ours, golden, rtol=1e-5, atol=1e-5 * float(golden.abs().max()))


def drawn_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Float32 weights by name, drawn in the order of the names as they were for the recording."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _drawn(name, torch.randn(shapes[name], generator=generator)) for name in sorted(shapes)}


def _drawn(name: str, noise: Tensor) -> Tensor:
    if noise.ndim > 1:
        fan_in = noise.numel() // noise.shape[0]
        return noise * next((s for end, s in _SPREADS.items() if name.endswith(end)), 1.3 / math.sqrt(fan_in))
    scales = name.endswith(".weight")  # of a normalisation
    return 1 + 0.15 * noise if scales else 0.1 * noise


def write_tiny(folder: Path) -> None:
    """The tiny checkpoint of the first paper's code, as its authors publish theirs, with its vision tower beside it."""
    shutil.copytree(GOLDENS / "tiny", folder)
    shapes = json.loads((GOLDENS / "tiny" / "shapes.json").read_text())
    (folder / "shapes.json").unlink()
    tower = drawn_weights(shapes["tower"], 11)
    weights = drawn_weights(shapes["model"], 12)
    weights |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
    half = torch.arange(0, 16, 2).float() / 16
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 1.0 / 10000**half
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(tower, folder / "clip_vit_tiny" / "model.safetensors", metadata={"format": "pt"})


def write_tiny_qwen(folder: Path) -> None:
    """The tiny checkpoint of Flash-VStream-Qwen, as its authors publish theirs."""
    shutil.copytree(GOLDENS / "qwen" / "tiny", folder)
    shapes = json.loads((folder / "shapes.json").read_text())
    (folder / "shapes.json").unlink()
    save_file(drawn_weights(shapes, 21), folder / "model.safetensors", metadata={"format": "pt"})
