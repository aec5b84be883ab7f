"""The small networks beside a language model, grounding, sight and short answers, as files of a folder.

Each has its weights in ``NAME.safetensors``. What its size depends on, besides the model it belongs to, is in
``NAME.json``, in the form of the model config's ``NAME_config``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flash_vstream.errors import UserError

SMALL_NETWORKS = ("grounding", "sight", "short_answers")


def weights_file(name: str) -> str:
    """The name of the file with a network's weights."""
    return f"{name}.safetensors"


def config_file(name: str) -> str:
    """The name of the file with a network's config."""
    return f"{name}.json"


def files_in(folder: Path) -> list[str]:
    """The names of the small networks' files that a folder has."""
    names = [file(name) for name in SMALL_NETWORKS for file in (weights_file, config_file)]
    return [name for name in names if (folder / name).exists()]


def add_configs(config: Any, folder: Path) -> None:
    """Make a model's config one with the networks whose configs are in ``folder``."""
    for name in SMALL_NETWORKS:
        if (folder / config_file(name)).exists():
            setattr(config, f"{name}_config", json.loads((folder / config_file(name)).read_text()))


def load_networks(model: Any, folder: Path) -> None:
    """Load the networks in ``folder`` into a model; raises ``UserError`` if one cannot be read or does not fit."""
    for name in SMALL_NETWORKS:
        file = folder / weights_file(name)
        if not file.exists():
            continue
        network, what = getattr(model, name), name.replace("_", " ")
        if network is None:
            raise UserError(f"this model has no {what}; its config lacks {name}_config")
        try:
            network.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{file} does not fit this model's {what}: {str(error).splitlines()[0]}") from None


def save_network(network: torch.nn.Module, name: str, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a network's weights, in float16, and its config, if it is given, to ``folder``."""
    state = {key: value.detach().half().contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / weights_file(name))
    if config is not None:
        (folder / config_file(name)).write_text(json.dumps(config))


def save_networks(model: Any, folder: Path) -> None:
    """Write all of a model's small networks to ``folder``."""
    for name in SMALL_NETWORKS:
        if (network := getattr(model, name)) is not None:
            save_network(network, name, folder, getattr(model.config, f"{name}_config"))
