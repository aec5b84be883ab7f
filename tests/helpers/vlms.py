"""Folders of tiny vision-language models with random weights, in the layouts that Transformers saves."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import decoders
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from flash_vstream.memory import StarConfig
from helpers.models import char_tokenizer

MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"),
    *("<fake_token_around_image>", "<global-img>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"),
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 560,
    "max_position_embeddings": 4096,
    "head_dim": 8,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
            **{"window_size": 56, "fullatt_block_indexes": [1]},
        },
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "num_hidden_layers": 3, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {
            **{"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
            **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        },
    },
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama", "pad_token_id": 0},
        "vision_config": {**SIGLIP, "image_size": 64, "patch_size": 8},
        "scale_factor": 2,
    },
    "llava_onevision": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 8},
        "vision_feature_layer": -1,
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**SIGLIP, "image_size": [64, 64], "patch_size": [8, 8]},
        "downsample_ratio": 0.5,
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8},
        "mm_tokens_per_image": 16,
    },
}
"""The tiny configurations by ``model_type``; each makes 4x4 tokens of a frame."""
TINY_STAR = StarConfig(
    spatial_size=4,
    temporal_size=1,
    abstract_size=1,
    spatial_length=2,
    temporal_length=0,
    abstract_length=0,
    retrieved_length=0,
    longterm_length=6,
    longterm_size=2,
)


def marked_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A character tokenizer with the marks of all families, and a chat template."""
    tokenizer = char_tokenizer(bos=template == GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.eos_token = "<end_of_turn>" if template == GEMMA else "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def tiny_vlm(model_type: str, folder: Path) -> Path:
    """Save a tiny model of a family to ``folder``; its weights are random, but always the same."""
    tokenizer = marked_tokenizer(GEMMA if model_type == "gemma3" else CHATML)
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"image_token_id": ids("<image>"), "video_token_id": ids("<video>")}
    if model_type.startswith("qwen"):
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = {name: ids(mark) for name, mark in zip(names, QWEN_MARKS, strict=True)}
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], **tokens)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    spread_out(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def tiny_vlm_for_vllm(model_type: str, folder: Path) -> Path:
    """``tiny_vlm`` of a Qwen family as vLLM can load it on a CPU: wider heads, and the settings of its processors."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    given = CONFIGS[model_type]
    text = {**given["text_config"], **sizes, "rope_parameters": {**given["text_config"]["rope_parameters"]}}
    text["rope_parameters"]["mrope_section"] = [4, 6, 6]
    vision = {**given["vision_config"], "hidden_size": 128, "out_hidden_size": 128}
    with patch.dict(CONFIGS, {model_type: {"text_config": text, "vision_config": vision}}):
        tiny_vlm(model_type, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # as Qwen's, it gives a text back as it was
    tokenizer.save_pretrained(folder)
    name = "Qwen3VL" if model_type == "qwen3_vl" else "Qwen2_5_VL"
    settings = {
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": f"{name}Processor"},
        **{"patch_size": 16 if model_type == "qwen3_vl" else 14, "temporal_patch_size": 2, "merge_size": 2},
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    }
    video = {"video_processor_type": "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor"}
    for kind, own in (("", {"image_processor_type": "Qwen2VLImageProcessor"}), ("video_", video)):
        (folder / f"{kind}preprocessor_config.json").write_text(json.dumps(settings | own))
    return folder


def spread_out(model: torch.nn.Module) -> None:
    """Make the weights large enough that what a tiny model sees changes what it says."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)
            elif "newline" in name or "mm_input" in name:
                parameter.normal_()


def tiny_pair(folder: Path) -> Path:
    """Save a tiny SigLIP with random weights to ``folder``."""
    torch.manual_seed(1)
    text = {**SIGLIP, "vocab_size": 560, "max_position_embeddings": 32, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**SIGLIP, "image_size": 32, "patch_size": 8})
    SiglipModel(config).save_pretrained(folder)
    marked_tokenizer(None).save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
