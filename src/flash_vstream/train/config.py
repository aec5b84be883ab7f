"""The YAML config of a training stage."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from flash_vstream.errors import UserError


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on every linear layer of the language model."""

    rank: int
    alpha: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Tune:
    """What a stage trains; everything else is frozen. ``language_model`` means full fine-tuning."""

    projector: bool = True
    semantic_attention: bool = True
    language_model: bool = False
    lora: Lora | None = None


@dataclass(frozen=True)
class StageConfig:
    """One training stage. See ``configs/`` for working examples.

    ``model`` is ``nano-base``, a model name or a model folder. ``adapter`` is an adapter folder to
    start from. ``grounding`` is a file written by ``train grounding`` (default: the model's own).
    ``data`` lists the data sources (``train/mixture.py`` documents the kinds). A batch holds
    ``batch_size`` streams, and ``accumulate`` batches make one step. ``dtype`` is ``auto`` (bfloat16
    where the processor multiplies it fast, otherwise float32), ``float32`` or ``bfloat16``.
    ``compile`` compiles the language model's layers; it needs a C++ compiler and, on CPUs, cuts a
    step to three quarters of its time.
    """

    stage: int
    model: str
    data: tuple[dict[str, Any], ...]
    steps: int
    batch_size: int
    learning_rate: float
    tune: Tune = field(default_factory=Tune)
    adapter: str | None = None
    grounding: str | None = None
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 50
    dtype: str = "auto"
    compile: bool = False

    @classmethod
    def load(cls, path: Path) -> "StageConfig":
        """Load a stage's YAML config. Raises ``UserError`` with the reason when it is invalid."""
        values = read_settings(path)
        try:
            tune = dict(values.pop("tune", {}))
            lora = tune.pop("lora", None)
            data = tuple(values.pop("data"))
            return cls(**values, data=data, tune=Tune(**tune, lora=Lora(**lora) if lora else None))
        except KeyError as error:
            raise UserError(f"{path} lacks the setting {error}") from None
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{path}: {error}; the settings are {names}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Load settings from a YAML file. Raises ``UserError`` when it is unreadable or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the training config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of settings, such as configs/nano-stage1.yaml")
    return values
