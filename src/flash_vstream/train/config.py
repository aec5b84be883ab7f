"""The YAML config of a training stage."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flash_vstream.errors import UserError

Settings = TypeVar("Settings")


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

    What is trained, and on what:

    - ``model`` is ``nano-base``, a model name or a model folder. ``adapter`` is an adapter folder to
      start from. ``networks`` are folders written by ``train grounding``, ``train sight`` and ``train short-answers``
      (default: the model's own).
    - ``data`` lists the data sources (``train/mixture.py`` documents the kinds), ``validation`` those whose
      mean loss is measured on the way and never trained on.
    - ``template`` is the prompt template of this stage (default: the model's own).
    - ``max_length`` bounds a sequence in tokens; longer ones lose answers, never tokens of the memory.
    - ``max_skipped`` is how many samples with unreadable media may be left out before the run stops.

    How long, and how:

    - Either ``steps``, or ``epochs`` over data that ends.
    - A batch holds ``batch_size`` samples per process, and ``accumulate`` batches make one step.
      ``total_batch_size`` sets the samples of a step instead, whatever the number of processes.
    - ``dtype`` is ``auto`` (bfloat16 where the processor multiplies it fast, otherwise float32),
      ``float32`` or ``bfloat16``. ``attention`` is ``eager``, ``sdpa`` or ``flash_attention_2`` (default: sdpa
      on GPUs, eager on CPUs, which are faster with it).
    - ``compile`` compiles the language model's layers; it needs a C++ compiler and, on CPUs, cuts a
      step to three quarters of its time.
    - ``trainer`` holds further fields of Transformers' ``TrainingArguments``, such as ``fsdp``, ``deepspeed``,
      ``optim``, ``gradient_checkpointing``, ``logging_steps`` or ``dataloader_num_workers``.
    """

    stage: int
    model: str
    data: tuple[dict[str, Any], ...]
    batch_size: int
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    total_batch_size: int | None = None
    tune: Tune = field(default_factory=Tune)
    adapter: str | None = None
    networks: tuple[str, ...] = ()
    template: str | None = None
    validation: tuple[dict[str, Any], ...] = ()
    max_length: int | None = None
    max_skipped: int = 10
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 50
    dtype: str = "auto"
    attention: str | None = None
    compile: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "StageConfig":
        """Load a stage's YAML config. Raises ``UserError`` with the reason when it is invalid."""
        values = read_settings(path)
        try:
            tune = dict(values.pop("tune", {}))
            lora = tune.pop("lora", None)
            data, validation = tuple(values.pop("data")), tuple(values.pop("validation", ()))
            networks = tuple(values.pop("networks", ()))
            tuned = Tune(**tune, lora=Lora(**lora) if lora else None)
            config = cls(**values, data=data, validation=validation, networks=networks, tune=tuned)
        except KeyError as error:
            raise UserError(f"{path} lacks the setting {error}") from None
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(
                f"{path}: {error}; the settings are {names} (those of TrainingArguments go under trainer)"
            ) from None
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"{path} must set either steps or epochs")
        if self.total_batch_size is not None and self.accumulate != 1:
            raise UserError(f"{path} sets both total_batch_size and accumulate; either follows from the other")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"{path}: dtype {self.dtype!r} must be auto, float32 or bfloat16")
        if self.attention not in (None, "eager", "sdpa", "flash_attention_2"):
            raise UserError(f"{path}: attention {self.attention!r} must be eager, sdpa or flash_attention_2")
        if self.adapter is not None and self.tune.lora is None:
            raise UserError(
                f"{path} starts from an adapter but trains none; set tune.lora, or name a model that has the adapter"
                " merged in"
            )


def load_settings(kind: type[Settings], path: Path) -> Settings:
    """A config of the dataclass ``kind`` from a YAML file; raises ``UserError`` naming what is wrong with it."""
    try:
        return kind(**read_settings(path))
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
        raise UserError(f"{path}: {error}; the settings are {known}") from None


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
