"""Where the files that a Transformers model leaves for ``models/light.py`` are kept. Needs no PyTorch."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flash_vstream.files import folder_state
from flash_vstream.models.catalog import MODELS, model_folder
from flash_vstream.models.choice import ModelChoice
from flash_vstream.wheels import cache_dir

GRAPH_FORMAT = 3
"""To be raised with every change of what ``engines.openvino_graph`` and ``engines.openvino_tower`` build."""
FORMAT = 1
"""To be raised with every change of what ``light.keep`` writes."""
KEPT_MODELS = 8
"""The number of models for which files are kept; nano's take 22 MB, and its language model's graph 145 MB."""
SETTINGS = "settings.json"


def is_plain(choice: ModelChoice) -> bool:
    """Whether a model is to run on a CPU, unless there is a GPU, and in every other respect as it comes."""
    return choice.device in (None, "cpu") and choice == ModelChoice(choice.name, choice.device, memory=choice.memory)


def folder_of(choice: ModelChoice) -> Path | None:
    """The folder that a model is loaded from as it is; None if there is none, or the model is not ``is_plain``."""
    folder = model_folder(choice.name) if choice.name in MODELS else Path(choice.name).expanduser()
    return folder if is_plain(choice) and (folder / "config.json").is_file() else None


def kept_folder(choice: ModelChoice) -> Path | None:
    """What is kept of a model in the cache; None if nothing is."""
    folder = folder_of(choice)
    kept = None if folder is None else place_for(folder)
    return kept if kept is not None and (kept / SETTINGS).is_file() else None


def place_for(folder: Path) -> Path | None:
    """The cache folder for what was made from a model's folder in its present state; None without OpenVINO."""
    try:
        state = [*folder_state(folder), str(FORMAT), str(GRAPH_FORMAT), version("openvino")]
    except PackageNotFoundError:
        return None
    return cache_dir() / "light" / hashlib.sha256("\n".join(state).encode()).hexdigest()[:32]
