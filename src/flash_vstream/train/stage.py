"""Run one training stage on Transformers' Trainer: resumable, logged, and saved as a model at the end."""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamForConditionalGeneration, FlashVStreamProcessor
from flash_vstream.models.grounding import GROUNDING, Grounder, load_grounding, save_grounding
from flash_vstream.models.precision import best_dtype
from flash_vstream.train.config import StageConfig, Tune
from flash_vstream.train.datasets import Collator
from flash_vstream.train.mixture import Encode, build_dataset

LORA_TARGETS = r"language_model\..*layers\.\d+\..*_proj"
"""Every linear layer in the language model's blocks, by the names used in Llama-like models."""


def tuned(model: FlashVStreamForConditionalGeneration, tune: Tune, adapter: Path | None) -> torch.nn.Module:
    """Unfreeze what the stage trains; with LoRA, return ``model`` wrapped as a PEFT model.

    The vision tower stays frozen in both stages, as in the paper.
    """
    model.requires_grad_(False)
    whole = [name for name in ("projector", "semantic_attention", "language_model") if getattr(tune, name)]
    if tune.lora is None:
        for name in whole:
            getattr(model, name).requires_grad_(True)
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    lora = LoraConfig(
        r=tune.lora.rank,
        lora_alpha=tune.lora.alpha,
        lora_dropout=tune.lora.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=whole,
    )
    return get_peft_model(model, lora)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, skipping any that a kill left incomplete.

    The Trainer writes ``trainer_state.json`` last, so a valid one marks a complete checkpoint.
    """
    complete = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    for path in sorted(complete, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except ValueError:
            continue
        return path
    return None


def run_stage(config: StageConfig, model_folder: Path, data: Path, output: Path, encode: Encode | None = None) -> Path:
    """Train a stage and return ``output/result``: a model folder or, with LoRA, an adapter folder.

    With LoRA, ``output/model`` is the model with the adapter merged in, ready for questions.

    Resumes from the newest checkpoint in ``output``, so rerunning the same command continues a killed
    run. TensorBoard logs go to ``output/logs``.
    """
    keep_freed_memory()
    set_seed(config.seed)  # first of all: an adapter's initial weights are random
    arguments = _arguments(config, output)  # also joins the other processes, if any
    processor: FlashVStreamProcessor = AutoProcessor.from_pretrained(model_folder)
    model = FlashVStreamForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    # Measured on AVX2 and AMX: eager attention with a tree mask trains at least as fast as sdpa.
    model.language_model.set_attn_implementation("eager")
    # All processes share one sample plan, and each reads its own batches of it. The plan is the same
    # as that of a single process with a batch size of batch_size * world_size.
    batch = config.batch_size * arguments.world_size
    samples = config.steps * batch * config.accumulate
    dataset = build_dataset(config.data, data, encode or _no_media, samples, batch, config.seed)
    if config.adapter and not Path(config.adapter).is_dir():
        raise UserError(f"there is no adapter at {config.adapter}; run the stage before, or mend the config")
    if config.grounding is not None:
        load_grounding(model, Path(config.grounding))
    network = tuned(model, config.tune, Path(config.adapter) if config.adapter else None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("the config's tune section trains nothing; set projector, language_model or lora")
    if arguments.bf16 and config.tune.lora is not None:
        _halve_frozen(network)
    if config.compile:
        for layer in model.language_model.get_decoder().layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(processor, model.config.star, Grounder.from_model(model, processor.tokenizer)),
    )
    checkpoint = last_checkpoint(output)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    result = output / "result"
    trainer.save_model(str(result))
    trainer.save_state()
    if trainer.is_world_process_zero():
        _save_result(config, model, processor, model_folder, output)
    trainer.accelerator.wait_for_everyone()
    return result


def _save_result(
    config: StageConfig,
    model: FlashVStreamForConditionalGeneration,
    processor: FlashVStreamProcessor,
    model_folder: Path,
    output: Path,
) -> None:
    """Save the rest of the result: the processor and, with LoRA, grounding and the merged model."""
    result = output / "result"
    processor.save_pretrained(result)
    if config.tune.lora is not None:
        if model.grounding is not None:
            save_grounding(model.grounding, result)
        _merge(model_folder, result, output / "model")
        processor.save_pretrained(output / "model")


def _halve_frozen(network: torch.nn.Module) -> None:
    """Keep frozen weights in bfloat16, so that autocast does not convert them at every step.

    Grounding is excluded: it takes no part in a step and is saved unchanged with the result.
    """
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and ".grounding." not in name:
            parameter.data = parameter.data.bfloat16()


def _merge(model_folder: Path, adapter: Path, output: Path) -> None:
    """Save the model with the adapter merged in, starting from the base model's float32 weights."""
    from peft import PeftModel

    model = FlashVStreamForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    if (adapter / GROUNDING).exists():
        load_grounding(model, adapter / GROUNDING)
    merged: Any = PeftModel.from_pretrained(model, str(adapter))
    merged.merge_and_unload().save_pretrained(output)


def _arguments(config: StageConfig, output: Path) -> TrainingArguments:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        # A batch without video, or with few frames, trains neither projector nor semantic attention.
        ddp_find_unused_parameters=True,
        bf16=best_dtype(device) == torch.bfloat16 if config.dtype == "auto" else config.dtype == "bfloat16",
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=10,
        save_steps=config.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=["tensorboard"],
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, which saves a fifth of a step's time.

    By default glibc returns every large tensor to the kernel, which must zero the pages again.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)


def _no_media(path: Path) -> Any:
    raise UserError(f"no encoder to read {path} with")
