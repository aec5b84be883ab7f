"""Published Flash-VStream checkpoints (the authors' LLaVA layout) as models of this project."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaConfig, PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from flash_vstream.errors import UserError
from flash_vstream.memory import StarConfig
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.models.processing import FlashVStreamProcessor

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
# Present in the checkpoint and without effect there: the tower is loaded from its own source, the
# inverse frequencies are a constant, and the abstract memory's update uses queries and keys alone.
_IGNORED = re.compile(r"vision_tower\.|rotary_emb\.inv_freq$|attention_model\.(v_proj|out_proj|out_ln)\.")


def is_published_layout(place: str) -> bool:
    """Whether a folder or hub id holds a checkpoint in the authors' layout (``vstream`` config)."""
    path = Path(place) / "config.json"
    if not path.exists():
        return False if Path(place).is_dir() else _hub_config(place).get("model_type") == "vstream"
    return json.loads(path.read_text()).get("model_type") == "vstream"


def _hub_config(hub_id: str) -> dict[str, Any]:
    return json.loads((Path(_download(hub_id, ["config.json"])) / "config.json").read_text())


def _download(hub_id: str, patterns: list[str]) -> str:
    try:
        return snapshot_download(hub_id, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"could not fetch {hub_id} from the Hugging Face hub: {str(error).splitlines()[0]}\n"
            "Check the name and the network, or give the path of a folder that holds the checkpoint."
        ) from None


def convert_checkpoint(source: str, target: Path) -> None:
    """Write the checkpoint at ``source`` (a folder or hub id) as a model folder at ``target``.

    Weights come from safetensors or, with code refused, from PyTorch shards. The vision tower is
    the one that the checkpoint names (``mm_vision_tower``), relative to its folder or on the hub.
    Raises ``UserError`` for a checkpoint that is not in this layout or lacks weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(_download(source, ["*.json", "*.safetensors", "*.bin", "tokenizer*"]))
    values = json.loads((folder / "config.json").read_text())
    tower = _vision_tower(folder, values.get("mm_vision_tower", ""))
    config = _config(values, tower.config)
    dtype = getattr(torch, values.get("torch_dtype") or "float16")
    model = FlashVStreamForConditionalGeneration(config).to(dtype)
    _load(model, folder)
    model.vision_tower.load_state_dict(tower.to(dtype).state_dict())
    model.save_pretrained(target)
    _processor(folder, values, config).save_pretrained(target)


def _vision_tower(folder: Path, name: str) -> PreTrainedModel:
    local = folder / name
    place = (
        str(local)
        if name and local.is_dir()
        else name
        if Path(name).is_dir()
        else _download(name, ["*.json", "*.safetensors", "*.bin"])
    )
    tower = AutoModel.from_pretrained(place)
    return tower.vision_model_only() if hasattr(tower, "vision_model_only") else tower


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


def _weights(folder: Path) -> Any:
    """Names and tensors of all shards, one shard in memory at a time."""
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
    )
