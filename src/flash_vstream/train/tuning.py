"""What a stage trains: parts of the model, or a LoRA adapter."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.adapters import read_adapter_settings
from flash_vstream.train.config import Lora, Tune

LORA_TARGETS = r"language_model\..*layers\.\d+\..*_proj"
"""Every linear layer in the language model's blocks, by the names used in Llama-like models."""


def tuned(model: FlashVStreamForConditionalGeneration, tune: Tune, adapter: Path | None) -> nn.Module:
    """Unfreeze what the stage trains; with LoRA, return ``model`` wrapped as a PEFT model.

    The vision tower stays frozen in both stages, as in the paper. Raises ``UserError`` for an ``adapter``
    of other settings than ``tune``'s.
    """
    model.requires_grad_(False)
    whole = [name for name in ("projector", "semantic_attention", "language_model") if getattr(tune, name)]
    if tune.lora is None:
        for name in whole:
            getattr(model, name).requires_grad_(True)
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        _check_adapter(adapter, tune.lora, whole)
        network = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        # Saving looks there for the base's vocabulary; a model's name would be asked of the hub.
        network.peft_config[network.active_adapter].base_model_name_or_path = model.name_or_path
        return network
    lora = LoraConfig(
        r=tune.lora.rank,
        lora_alpha=tune.lora.alpha,
        lora_dropout=tune.lora.dropout,
        target_modules=_lora_targets(model),
        modules_to_save=whole,
    )
    return get_peft_model(model, lora)


def _lora_targets(model: FlashVStreamForConditionalGeneration) -> str | list[str]:
    """The linear layers to adapt: by ``LORA_TARGETS`` or, for other names, all that are in the model's blocks."""
    linear = [
        name
        for name, module in model.language_model.get_decoder().named_modules(prefix="language_model")
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    if any(re.fullmatch(LORA_TARGETS, name) for name in linear):
        return LORA_TARGETS
    decoder = next(name for name, m in model.named_modules() if m is model.language_model.get_decoder())
    return [name.replace("language_model", decoder, 1) for name in linear]


def _check_adapter(adapter: Path, lora: Lora, whole: list[str]) -> None:
    settings: dict[str, Any] = read_adapter_settings(adapter)
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "fully trained": sorted(whole)}
    stored = {
        "rank": settings["r"],
        "alpha": settings.get("lora_alpha"),
        "dropout": settings.get("lora_dropout"),
        "fully trained": sorted(settings.get("modules_to_save") or []),
    }
    differ = [
        f"{name} is {stored[name]} there and {wanted[name]} here" for name in wanted if stored[name] != wanted[name]
    ]
    if differ:
        raise UserError(
            f"the adapter in {adapter} has other settings than tune: {'; '.join(differ)}. Training goes on with an"
            " adapter as it is; make tune the same, or start from a model with the adapter merged in"
        )
