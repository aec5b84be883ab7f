"""A fresh model: any causal language model and any vision tower, joined by an untrained projector."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_folder, write_text_atomically
from flash_vstream.memory import StarConfig
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.download import MODEL_FILES, commit_of, fetch_snapshot
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.models.prompts import TEMPLATES


def join(language_model: str, vision_tower: str, output: Path, template: str = "vicuna_v1", seed: int = 0) -> Path:
    """Write a model folder that joins two pretrained models, folders or hub ids (``ORG/MODEL@REVISION``).

    The memory has the paper's sizes, as far as the tower's grid allows. Features are taken as in the paper
    from a CLIP tower's last layer but one, from others' last layer. Projector and semantic attention are
    random by ``seed``. ``source.json`` names both parts and their commits. Raises ``UserError`` when a part
    cannot be loaded, the tower gives no square grid, or the tokenizer lacks the template's stop.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    if template not in TEMPLATES:
        raise UserError(f"no prompt template is called {template!r}; choose from {', '.join(TEMPLATES)}")
    language_folder, tower_folder = _folder(language_model), _folder(vision_tower)
    text, tokenizer = _load_language_model(language_folder), _tokenizer(language_folder)
    tower = _load_tower(tower_folder)
    size, mean, std = _pixels(tower_folder, tower)
    is_clip = tower.config.model_type == "clip_vision_model"
    grid, has_class_token = _grid(tower, size, -2 if is_clip else None)
    config = FlashVStreamConfig(
        vision_config=tower.config,
        text_config=text.config,
        memory_config=_memory(grid),
        vision_feature_layer=-2 if is_clip else None,
        vision_has_class_token=has_class_token,
        pooled_size=_memory(grid).spatial_size,
        prompt_template=template,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = FlashVStreamForConditionalGeneration(config)
    model.vision_tower.load_state_dict(tower.state_dict())
    model.language_model.load_state_dict(text.state_dict())
    model.generation_config = text.generation_config
    joined: Any = model
    joined.to(text.dtype)
    with atomic_folder(output) as scratch:
        joined.save_pretrained(scratch)
        frames = FrameProcessor(size, mean, std)
        processor = FlashVStreamProcessor(frames, tokenizer, template, memory_config=config.memory_config)
        processor.save_pretrained(scratch)
        parts = {"language_model": (language_model, language_folder), "vision_tower": (vision_tower, tower_folder)}
        origin = {part: {"name": name, "commit": commit_of(folder)} for part, (name, folder) in parts.items()}
        write_text_atomically(scratch / "source.json", json.dumps(origin, indent=1) + "\n")
    return output


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.is_dir() else fetch_snapshot(name, MODEL_FILES)


def _load_language_model(folder: Path) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds no causal language model: {str(error).splitlines()[0]}") from None
    return model


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-sequence token, so that no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _load_tower(folder: Path) -> PreTrainedModel:
    """The vision tower in a folder, which may hold a whole image-text model, such as CLIP."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        vision = getattr(config, "vision_config", config)
        loaded: Any = AutoModel.from_pretrained(
            folder, config=vision, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} holds no vision tower: {str(error).splitlines()[0]}") from None
    tower, report = loaded
    assert isinstance(tower, PreTrainedModel)
    if report["missing_keys"] or not hasattr(tower.config, "hidden_size"):
        reason = (
            f"it lacks {min(report['missing_keys'])}" if report["missing_keys"] else "its config has no hidden_size"
        )
        raise UserError(f"{folder} holds no vision tower: {reason}")
    return tower


def _pixels(folder: Path, tower: PreTrainedModel) -> tuple[int, list[float], list[float]]:
    """A tower's frame size, mean and standard deviation, from its processor or else CLIP's."""
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    clip = FrameProcessor()
    size = getattr(tower.config, "image_size", None) or clip.size
    return int(size), values.get("image_mean", clip.image_mean), values.get("image_std", clip.image_std)


def _grid(tower: PreTrainedModel, size: int, layer: int | None) -> tuple[int, bool]:
    """The side of a tower's feature grid, and whether a class token precedes it, by showing it a picture."""
    with torch.inference_mode():
        picture = torch.zeros(1, 3, size, size, dtype=tower.dtype)
        shown: Any = tower(pixel_values=picture, output_hidden_states=layer is not None)
    features = shown.last_hidden_state if layer is None else shown.hidden_states[layer]
    for has_class_token in (False, True):
        side = math.isqrt(features.shape[1] - has_class_token) if features.ndim == 3 else 0
        if side and side * side == features.shape[1] - has_class_token:
            return side, has_class_token
    raise UserError(f"the vision tower gives features of shape {list(features.shape)}, and no square grid of tokens")


def _memory(grid: int) -> StarConfig:
    """The paper's memory where the grid allows: sizes 8, 4 and 1, each the largest that divides the one above."""
    spatial = max(side for side in range(1, 9) if grid % side == 0)
    temporal = max(side for side in range(1, 5) if spatial % side == 0)
    return StarConfig(spatial_size=spatial, temporal_size=temporal, abstract_size=1)
