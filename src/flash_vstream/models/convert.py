"""Converts published Flash-VStream checkpoints (the authors' LLaVA layout) to this project's model folders."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from flash_vstream.errors import UserError
from flash_vstream.files import write_text_atomically
from flash_vstream.memory import StarConfig
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.download import MODEL_FILES, commit_of, fetch_snapshot
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.wheels import cache_errors

_RENAMES = (
    (r"^model\.mm_projector\.", "projector."),
    (r"^model\.attention_model\.", "semantic_attention."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", "language_model.model."),
)
_TEXT_FIELDS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# In the checkpoint but unused: the vision tower is loaded from its own source, the inverse frequencies
# are constant, and the abstract memory's update uses only queries and keys.
_IGNORED = re.compile(r"vision_tower\.|rotary_emb\.inv_freq$|attention_model\.(v_proj|out_proj|out_ln)\.")


def convert_checkpoint(source: str, target: Path) -> None:
    """Convert the checkpoint at ``source`` (a folder or hub id) to a model folder at ``target``.

    Weights are read from safetensors or from PyTorch shards (``weights_only``, so they cannot run
    code). The vision tower is the one the checkpoint names (``mm_vision_tower``), relative to its
    folder or on the hub. ``source.json`` in ``target`` records both names and, if they come from the
    hub, their commits. Raises ``UserError`` for a checkpoint that is not in this layout, is damaged or
    lacks weights.
    """
    folder = Path(source) if Path(source).is_dir() else fetch_snapshot(source, MODEL_FILES)
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tower_name = values.get("mm_vision_tower") or ""
        tower_folder = _tower_folder(folder, tower_name)
        tower = _vision_tower(tower_folder)
        config = _config(values, tower.config)
        dtype = _dtype(values.get("torch_dtype") or "float16")
        model = FlashVStreamForConditionalGeneration(config)
        nn.Module.to(model, dtype)
        _load(model, folder)
        nn.Module.to(tower, dtype)
        model.vision_tower.load_state_dict(tower.state_dict())
        processor = _processor(folder, values, config)
    # The errors that json, Transformers, PyTorch and safetensors raise for damaged files.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole Flash-VStream checkpoint: {_first_line(error)}") from error
    with cache_errors():
        model.save_pretrained(target)
        processor.save_pretrained(target)
        origin = {
            "checkpoint": {"name": source, "commit": commit_of(folder)},
            "vision_tower": {"name": tower_name, "commit": commit_of(tower_folder)},
        }
        write_text_atomically(target / "source.json", json.dumps(origin, indent=1) + "\n")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"the checkpoint's torch_dtype is {name!r}; it must be float16, bfloat16 or float32")
    return dtype


def _tower_folder(folder: Path, name: str) -> Path:
    if not name:
        raise UserError(f"{folder}/config.json names no vision tower (mm_vision_tower)")
    for place in (folder / name, Path(name)):
        if place.is_dir():
            return place
    return fetch_snapshot(name, MODEL_FILES)


def _config(values: dict[str, Any], vision: PretrainedConfig) -> FlashVStreamConfig:
    memory = StarConfig(
        spatial_size=values.get("compress_size", 8),
        temporal_size=values.get("compress_long_memory_size", 4),
        abstract_size=values.get("compress_Turing_memory_size", 1),
        spatial_length=values.get("video_current_memory_length", 1),
        temporal_length=values.get("video_long_memory_length", 25),
        abstract_length=values.get("video_Turing_memory_length", 25),
        update_ratio=values.get("compress_Turing_update_ratio", 0.2),
    )
    text = LlamaConfig(**{name: value for name, value in values.items() if name in _TEXT_FIELDS and value is not None})
    return FlashVStreamConfig(
        vision_config=vision,
        text_config=text,
        memory_config=memory,
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        pooled_size=memory.spatial_size,
        prompt_template="vicuna_v1",
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"),
        pad_token_id=values.get("pad_token_id"),
    )


def _load(model: FlashVStreamForConditionalGeneration, folder: Path) -> None:
    missing = {name for name, _ in model.named_parameters() if not name.startswith("vision_tower.")}
    own = dict(model.named_parameters())
    for key, value in _weights(folder):
        if _IGNORED.search(key):
            continue
        name = next((re.sub(old, new, key) for old, new in _RENAMES if re.match(old, key)), key)
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{folder} is not a Flash-VStream checkpoint: {key} {list(value.shape)} does not belong")
        own[name].data.copy_(value)
        missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, {min(missing)} among them; is the download complete?")


def _vision_tower(folder: Path) -> PreTrainedModel:
    """The vision tower in a folder, which may hold a whole CLIP model, as for the paper's checkpoint."""
    whole_clip = AutoConfig.from_pretrained(folder).model_type == "clip"
    tower: PreTrainedModel = (CLIPVisionModel if whole_clip else AutoModel).from_pretrained(folder)
    return tower


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors from all shards, with one shard in memory at a time."""
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, file.get_tensor(key)
    for path in sorted(folder.glob("pytorch_model*.bin")) if not safe else ():
        shard: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        yield from shard.items()


def _processor(folder: Path, values: dict[str, Any], config: FlashVStreamConfig) -> FlashVStreamProcessor:
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        raise UserError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    tokenizer.padding_side = values.get("tokenizer_padding_side", "right")
    return FlashVStreamProcessor(
        FrameProcessor(config.vision_config.image_size),
        tokenizer,
        prompt_template=config.prompt_template,
        video_token_id=config.video_token_id,
        time_stamps=config.time_stamps,
        memory_config=config.memory_config,
    )
