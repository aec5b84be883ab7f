"""The small networks beside a language model, grounding, sight and short answers, as files of a folder.

Each has its weights in ``NAME.safetensors``. What its size depends on, besides the model it belongs to, is in
``NAME.json``, in the form of the model config's ``NAME_config``. Where the vision tower was trained with them,
``tower.safetensors`` has the weights that changed.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flash_vstream.errors import UserError

SMALL_NETWORKS = ("grounding", "sight", "short_answers")
TOWER = "tower.safetensors"


def weights_file(name: str) -> str:
    """The name of the file with a network's weights."""
    return f"{name}.safetensors"


def config_file(name: str) -> str:
    """The name of the file with a network's config."""
    return f"{name}.json"


def files_in(folder: Path) -> list[str]:
    """The names of the small networks' files that a folder has, and of its tower's."""
    names = [TOWER, *(file(name) for name in SMALL_NETWORKS for file in (weights_file, config_file))]
    return [name for name in names if (folder / name).exists()]


def add_configs(config: Any, folder: Path) -> None:
    """Make a model's config one with the networks whose configs are in ``folder``."""
    for name in SMALL_NETWORKS:
        if (folder / config_file(name)).exists():
            setattr(config, f"{name}_config", json.loads((folder / config_file(name)).read_text()))


def load_networks(model: Any, folder: Path) -> None:
    """Load the networks in ``folder`` into a model; raises ``UserError`` if one cannot be read or does not fit."""
    if (folder / TOWER).exists():
        _load_tower(model, folder / TOWER)
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


def _load_tower(model: Any, file: Path) -> None:
    try:
        _, unexpected = model.vision_tower.load_state_dict(load_file(file), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{file} does not fit this model's vision tower: {str(error).splitlines()[0]}") from None
    if unexpected:
        raise UserError(f"{file} does not fit this model's vision tower: it has no {unexpected[0]}")


def save_tower(model: Any, folder: Path, names: Collection[str]) -> None:
    """Write the vision tower's weights ``names``, in float16, to ``folder``."""
    state = model.vision_tower.state_dict()
    save_file({name: state[name].half().contiguous() for name in names}, folder / TOWER)


def save_network(network: torch.nn.Module, name: str, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a network's weights, in float16 unless they are integers, and its config, if it is given, to ``folder``."""
    state = {
        key: (value.detach().half() if value.is_floating_point() else value).contiguous()
        for key, value in network.state_dict().items()
    }
    save_file(state, folder / weights_file(name))
    if config is not None:
        (folder / config_file(name)).write_text(json.dumps(config))


def save_networks(model: Any, folder: Path) -> None:
    """Write all of a model's small networks to ``folder``."""
    for name in SMALL_NETWORKS:
        if (network := getattr(model, name)) is not None:
            save_network(network, name, folder, getattr(model.config, f"{name}_config"))
