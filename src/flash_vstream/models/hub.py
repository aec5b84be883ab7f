"""Fetches, assembles, converts and loads models by name, folder or hub id."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_folder, folder_state
from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration, FlashVStreamProcessor
from flash_vstream.models.adapters import BASE, is_adapter, merge_adapter, read_adapter_settings
from flash_vstream.models.catalog import HUB_7B, HUB_QWEN_7B, MODELS, NANO_ADAPTER, NANO_BASE, model_folder
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.flash_qwen import MODEL_TYPE
from flash_vstream.models.precision import best_dtype
from flash_vstream.models.vlm_families import FAMILIES
from flash_vstream.models.vlm_loading import is_vlm, load_vlm, load_vlm_processor, quantization
from flash_vstream.wheels import cache_dir, cache_errors

Report = Callable[[str], object]


def _quiet(text: str) -> None:
    """Discard the report."""


def pull(name: str, report: Report = _quiet) -> Path:
    """Fetch and assemble a model of ``MODELS`` (or ``nano-base``); returns its folder.

    ``report`` is called with progress messages. The folder is created atomically, and several
    processes may pull at once. Raises ``UserError`` for an unknown name, a source that does not
    respond, or a cache that cannot be written.
    """
    if name not in (*MODELS, NANO_BASE):
        raise UserError(f"no model is called {name!r}; the known ones are {', '.join(MODELS)}")
    if name == "flash-vstream-qwen-7b":
        return _build_once(model_folder(name), partial(_link_snapshot, HUB_QWEN_7B, report=report))
    if name == "flash-vstream-7b":
        return _build_once(model_folder(name), partial(_convert, HUB_7B, report=report))
    return _build_once(model_folder(name), partial(_assemble_nano, name, report=report))


def fetch_model(name: str, report: Report = _quiet) -> Path:
    """The local folder of a model; fetches, assembles or converts the model first if necessary.

    ``name`` is one of ``MODELS``, a model folder, or a hub id (``ORG/MODEL`` or
    ``ORG/MODEL@REVISION``). A folder or hub id in the layout of the published checkpoint is converted
    once, and again whenever its files change; an adapter's folder is likewise merged into its base. Raises
    ``UserError`` if there is no such model.
    """
    if name in MODELS or name == NANO_BASE:
        return pull(name, report)
    path = Path(name).expanduser()
    if path.is_dir() and is_adapter(path):
        return _with_adapter(path, report)
    if path.is_dir():
        return _converted(path, report) if _is_published_layout(path) else path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model at {name}; name one of {', '.join(MODELS)}, a model folder or a hub id")
    from flash_vstream.models.download import CONFIG_FILES, MODEL_FILES, fetch_snapshot

    report(f"looking for {name}")
    if _is_published_layout(fetch_snapshot(name, CONFIG_FILES)):
        return _converted(name, report)
    report(f"fetching {name}")
    return fetch_snapshot(name, MODEL_FILES)


def load(
    model: str | ModelChoice, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, FlashVStreamProcessor]:
    """Load a ``StreamModel`` and its processor by model name, model folder or hub id, ready to answer questions.

    ``device`` defaults to a GPU if there is one; ``dtype`` to bfloat16 if the device is fast in it,
    else float32. Raises ``UserError`` if there is no such model, its folder is broken, or the device
    has too little memory.
    """
    choice = ModelChoice.of(model)
    folder = fetch_model(choice.name)
    device = _device(device or choice.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (getattr(torch, choice.dtype) if choice.dtype else best_dtype(device))
    values = _read_config(folder)
    try:
        if is_vlm(values):
            with _damage_as_user_error(folder):
                loaded: Any = load_vlm(folder, values, choice, dtype)
                processor: FlashVStreamProcessor = load_vlm_processor(folder, values, choice)[1]
        else:
            loaded, processor = _read_model(folder, dtype, choice), _read_processor(folder)
        if choice.bits is None:
            nn.Module.to(loaded, device)
    except torch.OutOfMemoryError:
        message = f"{choice.name} in {dtype} does not fit the memory of {device}; use a smaller model or --bits 4"
        raise UserError(message) from None
    loaded.train(False)
    return loaded, processor


def load_processor(model: str | ModelChoice) -> tuple[Any, FlashVStreamProcessor]:
    """Configuration and processor of a model, without its weights; raises ``UserError`` as ``load`` does."""
    choice = ModelChoice.of(model)
    folder = fetch_model(choice.name)
    values = _read_config(folder)
    if is_vlm(values):
        with _damage_as_user_error(folder):
            return load_vlm_processor(folder, values, choice)
    return _read_model_config(folder), _read_processor(folder)


def _device(name: str) -> str:
    """``name``, if there is such a device; raises ``UserError`` otherwise."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {name} here ({str(error).splitlines()[0]})") from None
    return name


def _read_model(folder: Path, dtype: torch.dtype, choice: ModelChoice) -> FlashVStreamForConditionalGeneration:
    config = _read_model_config(folder)
    star = choice.star or config.star
    if choice.compat == "release":
        star = replace(star, compat="release", longterm_length=0)
    config.memory_config = star.to_dict()
    if choice.pair is not None:
        raise UserError(f"{choice.name} finds what a question asks for itself; --pair is for Transformers' own models")
    options: dict[str, Any] = {} if choice.attn is None else {"attn_implementation": choice.attn}
    if choice.bits is not None:
        options |= {"quantization_config": quantization(choice.bits), "device_map": choice.device or "auto"}
    with _damage_as_user_error(folder):
        integers = [] if hasattr(config, "quantization_config") else _integer_weights(folder)
        if integers:  # Transformers would cast them to floats without dequantizing
            raise ValueError(f"{integers[0]} holds integers, and config.json names no quantization")
        loaded: Any = FlashVStreamForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True, **options
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would fill them with random numbers
        raise _broken(folder, f"{len(missing)} weights are missing, {missing[0]} among them")
    assert isinstance(model, FlashVStreamForConditionalGeneration)
    model.attention_is_chosen = choice.attn is not None
    return model


def _integer_weights(folder: Path) -> list[str]:
    """Names of weights and biases that are not stored as floating-point numbers."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.endswith((".weight", ".bias"))]  # noqa: SIM118 - not a dict
            names += [key for key in keys if not file.get_slice(key).get_dtype().startswith(("F", "BF"))]
    return names


def _read_model_config(folder: Path) -> FlashVStreamConfig:
    model_type = _read_config(folder)["model_type"]
    if model_type != FlashVStreamConfig.model_type:
        known = ", ".join(sorted((FlashVStreamConfig.model_type, MODEL_TYPE, *FAMILIES)))
        raise UserError(f"{folder} is a {model_type} model; those that can be used are {known}")
    with _damage_as_user_error(folder):
        config = FlashVStreamConfig.from_pretrained(folder)
    assert isinstance(config, FlashVStreamConfig)
    return config


def _read_processor(folder: Path) -> FlashVStreamProcessor:
    with _damage_as_user_error(folder):
        processor = FlashVStreamProcessor.from_pretrained(folder, local_files_only=True)
    assert isinstance(processor, FlashVStreamProcessor)
    if processor.memory_config is None:  # saved by an earlier version
        processor.memory_config = _read_model_config(folder).memory_config
    return processor


@contextmanager
def _damage_as_user_error(folder: Path) -> Iterator[None]:
    """Turn any error that Transformers raises for damaged files in a model folder into a ``UserError``."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise _broken(folder, str(error).strip() or type(error).__name__) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _broken(folder, f"config.json: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise _broken(folder, "config.json names no model_type")
    return values


def _is_published_layout(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in the authors' layout (``model_type`` is ``vstream``)."""
    return bool(_read_config(folder)["model_type"] == "vstream")


def _broken(folder: Path, reason: str) -> UserError:
    made_here = cache_dir() in folder.parents
    remedy = "delete it, and it is made again when it is next used" if made_here else "copy or fetch it again"
    return UserError(f"the model folder {folder} is broken: {reason.splitlines()[0]}\nIf it once worked, {remedy}.")


def _assemble_nano(name: str, target: Path, report: Report) -> None:
    from flash_vstream.models import nano

    nano.assemble(target, NANO_ADAPTER if name == "nano" else None, report)


def _convert(source: str | Path, target: Path, report: Report) -> None:
    from flash_vstream.models.convert import convert_checkpoint

    report(f"converting {source}" if isinstance(source, Path) else f"fetching and converting {source}")
    convert_checkpoint(str(source), target)


def _link_snapshot(source: str, target: Path, report: Report) -> None:
    """Fetch a checkpoint that is loaded as it is; ``target`` becomes a folder of links to its files."""
    from flash_vstream.models.download import MODEL_FILES, fetch_snapshot

    report(f"fetching {source}")
    target.mkdir(parents=True, exist_ok=True)
    for path in fetch_snapshot(source, MODEL_FILES).iterdir():
        (target / path.name).symlink_to(path.resolve())


def _converted(source: str | Path, report: Report) -> Path:
    """The folder of a converted checkpoint in the authors' layout; converts it on first use.

    The folder's name has a hash of the source: either a folder's path with the size and modification
    time of its files, so that changed weights are converted again, or a hub id with its commit.
    """
    state = [str(source)]
    if isinstance(source, Path):
        state = folder_state(source)
    else:
        from flash_vstream.models.download import CONFIG_FILES, commit_of, fetch_snapshot

        state.append(commit_of(fetch_snapshot(source, CONFIG_FILES)) or "")
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()
    base = Path(str(source).partition("@")[0]).name
    folder = cache_dir() / "models" / f"converted-{base}-{digest[:12]}"
    return _build_once(folder, partial(_convert, source, report=report))


def _with_adapter(adapter: Path, report: Report) -> Path:
    """The folder of an adapter's base model with the adapter merged in; merges on first use."""
    name = read_adapter_settings(adapter)[BASE]
    if not name:
        raise UserError(f"{adapter} does not name the model that it was trained from ({BASE})")
    base = fetch_model(name, report)
    digest = hashlib.sha256("\n".join([*folder_state(adapter), *folder_state(base)]).encode()).hexdigest()

    def build(target: Path) -> None:
        report(f"merging {adapter} into {name}")
        merge_adapter(base, adapter, target)
        _read_processor(base).save_pretrained(target)

    return _build_once(cache_dir() / "models" / f"adapted-{adapter.resolve().name}-{digest[:12]}", build)


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, which ``build`` creates if it does not exist; other processes wait meanwhile."""
    if folder.exists():
        return folder
    with cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with atomic_folder(folder) as scratch:
                    build(scratch)
    return folder


def silence_transformers() -> None:
    """Keep Transformers' progress bars and warnings off the terminal."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
