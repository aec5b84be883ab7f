"""Run one training stage on Transformers' Trainer: resumable, logged, and saved as a model at the end."""

import copy
import ctypes
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, set_seed

from flash_vstream.descriptors import allow_open_files
from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamForConditionalGeneration, FlashVStreamProcessor
from flash_vstream.models.adapters import merge_adapter, name_base
from flash_vstream.models.configuration import FlashVStreamConfig
from flash_vstream.models.grounding import Grounder, Words
from flash_vstream.models.hints import Hinter
from flash_vstream.models.prompts import TEMPLATES
from flash_vstream.models.small_networks import (
    SMALL_NETWORKS,
    TOWER,
    add_configs,
    files_in,
    load_networks,
    save_networks,
)
from flash_vstream.train.arguments import accumulation, check_resumed, training_arguments, world_size
from flash_vstream.train.config import StageConfig
from flash_vstream.train.datasets import Collator, Mixture
from flash_vstream.train.mixture import Encode, build_dataset, finite_dataset
from flash_vstream.train.trainer import StageTrainer
from flash_vstream.train.tuning import tuned


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
    run. TensorBoard logs go to ``output/logs``. Raises ``UserError`` for a config that contradicts
    itself, its data or the run that it continues.
    """
    keep_freed_memory()
    allow_open_files()  # each tensor of a batch that a worker made is one
    set_seed(config.seed)  # first of all: an adapter's initial weights are random
    checkpoint = last_checkpoint(output)
    check_resumed(config, output, checkpoint is not None)
    dataset, validation, steps = _datasets(config, data, encode or _no_media)
    arguments = training_arguments(config, steps, output)  # also joins the other processes, if any
    processor = _processor(model_folder, config.template)
    model = _model(config, model_folder)
    # Measured on AVX2 and AMX: eager attention with a tree mask trains at least as fast as sdpa.
    attention = config.attention or ("sdpa" if torch.cuda.is_available() else "eager")
    try:
        model.language_model.set_attn_implementation(attention)
    except ImportError as error:
        raise UserError(f"attention {attention} cannot be used here: {str(error).splitlines()[0]}") from None
    if config.adapter and not Path(config.adapter).is_dir():
        raise UserError(f"there is no adapter at {config.adapter}; run the stage before, or mend the config")
    network = tuned(model, config.tune, Path(config.adapter) if config.adapter else None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("the config's tune section trains nothing; set projector, language_model or lora")
    if arguments.bf16 and config.tune.lora is not None:
        _halve_frozen(network)
    if config.compile:
        for layer in model.language_model.get_decoder().layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    hinter = _hinter(model, processor.tokenizer)
    chains = attention == "flash_attention_2"
    try:
        trainer = StageTrainer(
            model=network,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=Collator(processor, model.config.star, hinter, config.max_length, chains),
            max_skipped=config.max_skipped,
            small_checkpoints=config.tune.lora is None and not config.tune.language_model,
        )
    except (ImportError, RuntimeError) as error:  # a logger's package is missing
        raise UserError(f"cannot train with these settings: {str(error).splitlines()[0]}") from None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # the result is one whole
    result = output / "result"
    trainer.save_model(str(result))
    trainer.save_state()
    if trainer.is_world_process_zero():
        _save_result(config, model, _processor(model_folder), model_folder, output)
    trainer.accelerator.wait_for_everyone()
    return result


def _model(config: StageConfig, folder: Path) -> FlashVStreamForConditionalGeneration:
    """The model to train, with the small networks that the config names."""
    settings = FlashVStreamConfig.from_pretrained(folder)
    for networks in config.networks:
        if not files_in(Path(networks)):
            raise UserError(f"{networks} holds no small network; run its training before, or mend the config")
        add_configs(settings, Path(networks))
    model = FlashVStreamForConditionalGeneration.from_pretrained(folder, config=settings, dtype=torch.float32)
    for networks in config.networks:
        load_networks(model, Path(networks))
    return model


def _hinter(model: FlashVStreamForConditionalGeneration, tokenizer: Any) -> Hinter | None:
    """The model's hinter, with networks of its own that stay on the CPU.

    Batches are made by other processes, in which a GPU cannot be used.
    """
    if model.grounding is None:
        return None
    table: Any = model.get_input_embeddings().weight
    words = Words(tokenizer, table.detach().clone())
    grounding, sight, short_answers = (getattr(model, name) for name in SMALL_NETWORKS)
    return Hinter(Grounder(copy.deepcopy(grounding), words, copy.deepcopy(sight)), copy.deepcopy(short_answers))


def _datasets(config: StageConfig, data: Path, encode: Encode) -> tuple[Any, Any, int]:
    """Training data, validation data (or None), and how many steps the stage takes."""
    # All processes share one sample plan, and each reads its own batches of it. The plan is the same
    # as that of a single process with a batch size of batch_size * world_size.
    batch = config.batch_size * world_size()
    step = batch * accumulation(config)
    validation = finite_dataset(config.validation, data, encode, config.seed) if config.validation else None
    if config.steps is not None:
        dataset = build_dataset(config.data, data, encode, config.steps * step, batch, config.seed)
        return dataset, validation, config.steps
    assert config.epochs is not None
    once = finite_dataset(config.data, data, encode, config.seed)
    steps = math.ceil(len(once) * config.epochs / step)
    return Mixture([once], [1.0], steps * step, batch, config.seed), validation, steps


def _processor(model_folder: Path, template: str | None = None) -> FlashVStreamProcessor:
    processor: FlashVStreamProcessor = AutoProcessor.from_pretrained(model_folder)
    if template is not None:
        if template not in TEMPLATES:
            raise UserError(f"no prompt template is called {template!r}; choose from {', '.join(TEMPLATES)}")
        processor.prompt_template = template
    return processor


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
        base = Path(config.model)
        name_base(result, str(base.resolve()) if base.is_dir() else config.model)
        save_networks(model, result)
        for networks in config.networks:
            if (Path(networks) / TOWER).exists():
                shutil.copyfile(Path(networks) / TOWER, result / TOWER)
        merge_adapter(model_folder, result, output / "model")
        processor.save_pretrained(output / "model")


def _halve_frozen(network: torch.nn.Module) -> None:
    """Keep frozen weights in bfloat16, so that autocast does not convert them at every step.

    The small networks are excluded: they take no part in a step, and compare scores that are close together.
    """
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and not any(f".{kept}." in name for kept in SMALL_NETWORKS):
            parameter.data = parameter.data.bfloat16()


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
