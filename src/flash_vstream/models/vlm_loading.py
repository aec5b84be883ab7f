"""Loads vision-language models of Transformers, and Flash-VStream-Qwen, from model folders."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)

from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.flash_qwen import (
    MODEL_TYPE,
    SIDE,
    FlashQwenFamily,
    FlashQwenProcessor,
    FlashVStreamQwen,
    flash_qwen_config,
    flash_star,
)
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.text_image import TextImagePair
from flash_vstream.models.vlm import TransformersVlm, VlmConfig, default_star
from flash_vstream.models.vlm_families import FAMILIES, Family
from flash_vstream.models.vlm_processing import VlmProcessor

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""No code of a checkpoint is run, and Transformers never asks whether it may."""
_IMAGE_SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def is_vlm(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a model that this module loads."""
    return values["model_type"] in (*FAMILIES, MODEL_TYPE)


def load_vlm(folder: Path, values: Mapping[str, Any], choice: ModelChoice, dtype: torch.dtype) -> TransformersVlm:
    """The model in a folder whose ``config.json`` has ``values``, on the CPU unless it is quantized.

    Raises ``UserError`` for a model that cannot be loaded in this way; errors of Transformers are passed on.
    """
    family, star = _family(folder, values, choice)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **LOCAL}
    if choice.attn is not None:
        options["attn_implementation"] = choice.attn
    if choice.bits is not None:
        options |= {"quantization_config": quantization(choice.bits), "device_map": choice.device or "auto"}
    kind: Any = AutoModelForImageTextToText
    if isinstance(family, FlashQwenFamily):
        kind, options["config"] = Qwen2VLForConditionalGeneration, family.config
    network, report = kind.from_pretrained(folder, **options)
    _check_complete(report, strict=isinstance(family, FlashQwenFamily))
    if isinstance(family, FlashQwenFamily):
        model: TransformersVlm = FlashVStreamQwen(network, family, star)
    else:
        pair = _pair(choice.pair, folder, dtype) if choice.pair is not None else None
        model = TransformersVlm(network, family, star, pair)
    model.attention_is_chosen = choice.attn is not None
    return model


def load_vlm_processor(folder: Path, values: Mapping[str, Any], choice: ModelChoice) -> tuple[VlmConfig, VlmProcessor]:
    """Configuration and processor of the model in a folder, without its weights."""
    family, star = _family(folder, values, choice)
    mean, std = _normalisation(folder)
    frames = FrameProcessor(family.pixels, mean, std)
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    stops, template = _stop_ids(folder), _chat_template(folder)
    config = VlmConfig(family.config.get_text_config(), star)
    if isinstance(family, FlashQwenFamily):
        return config, FlashQwenProcessor(frames, tokenizer, family, stops, template)
    return config, VlmProcessor(frames, tokenizer, family, stops, template)


def quantization(bits: int) -> Any:
    """Transformers' settings for loading weights in 4 or 8 bits; raises ``UserError`` if no library for it is there."""
    if find_spec("bitsandbytes") is not None:
        from transformers import BitsAndBytesConfig

        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if find_spec("torchao") is not None:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig())
    raise UserError(f"weights in {bits} bits need bitsandbytes or torchao, and neither is installed")


def _family(folder: Path, values: Mapping[str, Any], choice: ModelChoice) -> tuple[Family, Any]:
    """The family of a model with its configuration, and the sizes of its memory."""
    star = choice.star
    if values["model_type"] == MODEL_TYPE:
        config: Any = flash_qwen_config(dict(values))
        side = star.spatial_size if star is not None else SIDE
        settings = dict(values.get("vision_config") or {}).get("flash_memory_config") or {}
        star = star or flash_star(settings, side)
        return FlashQwenFamily(config, side), replace(star, compat="release") if choice.compat == "release" else star
    if choice.compat == "release":
        raise UserError(f"{choice.name} has no memory that was released with it; leave out --compat")
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    family = FAMILIES[values["model_type"]](config, star.spatial_size if star is not None else None)
    return family, star or default_star(family.side)


def _check_complete(report: Mapping[str, Any], strict: bool) -> None:
    """Raise ``ValueError`` for weights that are missing (Transformers would draw them at random) or left over."""
    kinds = {"missing_keys": "are missing", "mismatched_keys": "have another shape"}
    if strict:
        kinds["unexpected_keys"] = "do not belong to it"
    for kind, reason in kinds.items():
        if names := sorted(str(name) for name in report[kind]):
            raise ValueError(f"{len(names)} weights {reason}, {names[0]} among them")


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation that a model's pixels are normalised with."""
    for name in _IMAGE_SETTINGS:
        settings = _read_json(folder / name)
        for part in (settings, settings.get("image_processor"), settings.get("video_processor")):
            if isinstance(part, dict) and "image_mean" in part and "image_std" in part:
                return part["image_mean"], part["image_std"]
    raise ValueError(f"no image_mean and image_std in {', '.join(_IMAGE_SETTINGS)}")


def _stop_ids(folder: Path) -> list[int]:
    stops = _read_json(folder / "generation_config.json").get("eos_token_id")
    return [] if stops is None else stops if isinstance(stops, list) else [stops]


def _chat_template(folder: Path) -> str | None:
    """The processor's own chat template, which older repositories keep in JSON."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    template = _read_json(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text()) if path.exists() else {}
    return values if isinstance(values, dict) else {}


def _pair(name: str, folder: Path, dtype: torch.dtype) -> TextImagePair:
    """The text-image model ``name`` (a folder or hub id), for frames normalised as for the model in ``folder``."""
    from flash_vstream.models.hub import fetch_model

    own = fetch_model(name)
    network = AutoModel.from_pretrained(own, dtype=dtype, **LOCAL)
    if not hasattr(network, "get_text_features"):
        raise UserError(f"{name} is a {network.config.model_type} model; --pair takes SigLIP, CLIP or the like")
    tokenizer = AutoTokenizer.from_pretrained(own, **LOCAL)
    return TextImagePair(network, tokenizer, _normalisation(folder), _normalisation(own))
