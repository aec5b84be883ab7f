"""A stage's config as Transformers' ``TrainingArguments``, and whether it may continue an earlier run."""

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from flash_vstream.errors import UserError
from flash_vstream.files import write_text_atomically
from flash_vstream.models.precision import best_dtype
from flash_vstream.train.config import StageConfig

STAGE_FILE = "stage.json"
_OWN = {
    "output_dir": "--output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate or total_batch_size",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "save_steps": "save_every",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "dtype",
    "fp16": "dtype",
    "remove_unused_columns": "nothing: samples are no columns",
    "label_names": "nothing: a batch's labels are called labels",
    "train_sampling_strategy": "nothing: samples are planned for all processes together",
    "torch_compile": "compile",
}
"""Fields of ``TrainingArguments`` that have a name of their own in a stage's config."""
_MAY_CHANGE = ("save_every", "max_skipped", "validation", "trainer", "batch_size", "accumulate", "attention", "compile")
"""Settings that leave a run's result the same up to rounding, so that a resumed run may change them."""


def world_size() -> int:
    """How many processes train together; torchrun and accelerate set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(config: StageConfig) -> int:
    """How many batches of each process make a step. Raises ``UserError`` if ``total_batch_size`` cannot be met."""
    if config.total_batch_size is None:
        return config.accumulate
    batch = config.batch_size * world_size()
    if config.total_batch_size % batch:
        raise UserError(
            f"total_batch_size {config.total_batch_size} is no multiple of {config.batch_size} samples in each of"
            f" {world_size()} processes; choose another batch_size"
        )
    return config.total_batch_size // batch


def training_arguments(config: StageConfig, steps: int, output: Path) -> TrainingArguments:
    """The arguments of a stage; ``config.trainer`` adds to them or replaces defaults.

    Raises ``UserError`` for a field that does not exist, has a name of its own in the config, or needs a
    package that is missing.
    """
    for name in config.trainer:
        if name in _OWN:
            raise UserError(f"trainer.{name} is set by the config itself; use {_OWN[name]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "use_cpu": device == "cpu",
        "ddp_backend": "gloo" if device == "cpu" and world_size() > 1 else None,
        # With LoRA, the model's own projector is kept beside its trained copy.
        "ddp_find_unused_parameters": True,
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        # On a GPU, a step takes less time than composing its streams.
        "dataloader_num_workers": max(0, (os.cpu_count() or 1) - 2) if device == "cuda" else 0,
        "dataloader_pin_memory": device == "cuda",
        "prediction_loss_only": True,
        "per_device_eval_batch_size": config.batch_size,
    }
    if config.validation:
        settings |= {"eval_strategy": "steps", "eval_steps": config.save_every}
    settings |= config.trainer
    if "tensorboard" in settings["report_to"] and importlib.util.find_spec("tensorboard") is None:
        raise UserError("training logs to TensorBoard, which is not installed; install flash-vstream[train]")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    bfloat16 = best_dtype(device) == torch.bfloat16 if config.dtype == "auto" else config.dtype == "bfloat16"
    try:
        return TrainingArguments(
            **settings,
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=accumulation(config),
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            save_steps=config.save_every,
            seed=config.seed,
            data_seed=config.seed,
            bf16=bfloat16,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="sequential",
        )
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"the config's trainer section cannot be used: {str(error).splitlines()[0]}") from None


def check_resumed(config: StageConfig, output: Path, resumes: bool) -> None:
    """Record the config in ``output``, or compare it with that of the run to be continued.

    Raises ``UserError`` that names what changed: the optimizer and its schedule go on from the checkpoint, so
    that a new learning rate, for one, would have no effect.
    """
    path = output / STAGE_FILE
    settings = json.loads(json.dumps({**asdict(config), "processes": world_size()}))
    if resumes and path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in settings.items()
            if name not in (*_MAY_CHANGE, "processes") and before.get(name) != value
        ]
        samples = [s["batch_size"] * s["accumulate"] * s["processes"] for s in (before, settings)]
        if config.total_batch_size is None and samples[0] != samples[1]:
            changed.append(f"a step had {samples[0]} samples and has {samples[1]}")
        if changed:
            raise UserError(
                f"{output} holds a run of other settings: {'; '.join(changed)}. Name another --output, or restore them"
            )
    if os.environ.get("RANK", "0") == "0":
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(settings, indent=1) + "\n")
