"""Transformers' Trainer with counts of what was cut and left out, and with small checkpoints."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write

logger = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
"""A small checkpoint's weights: those that are trained, and nothing else."""


class StageTrainer(Trainer):
    """Trains on a ``Collator``'s batches.

    Every log has ``truncated`` and ``skipped``, the samples so far, in all processes, that were cut to the
    maximum length or whose media could not be read. More than ``max_skipped`` of the latter in one process
    end the run with a ``UserError``. With ``small_checkpoints``, checkpoints hold only what is trained, which
    in stage 1 is a thousandth of the model.
    """

    def __init__(self, *args: Any, max_skipped: int, small_checkpoints: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_skipped = max_skipped
        # DeepSpeed writes checkpoints of its own.
        self.small_checkpoints = small_checkpoints and not self.is_deepspeed_enabled
        self.truncated = 0
        self.skipped = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        try:
            return super().create_optimizer(model)
        except ImportError as error:  # bitsandbytes, for one
            raise UserError(f"the optimizer {self.args.optim} cannot be used: {str(error).splitlines()[0]}") from None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        problems, truncated = inputs.pop("problems"), inputs.pop("truncated")
        if model.training:
            self.truncated += truncated
            self.skipped += len(problems)
        for problem in problems:
            logger.warning("left out: %s", problem)
        if self.skipped > self.max_skipped:
            raise UserError(
                f"{self.skipped} samples could not be read, and max_skipped is {self.max_skipped}; the last was:"
                f" {problems[-1]}"
            )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        counts = torch.tensor([self.truncated, self.skipped], device=self.accelerator.device)
        total: Any = self.accelerator.reduce(counts, "sum")
        truncated, skipped = total.tolist()
        super().log({**logs, "truncated": truncated, "skipped": skipped}, *args, **kwargs)

    # --- small checkpoints

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (_internal_call and self.small_checkpoints):
            super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        state = self._trained_state()
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(output_dir) / TRAINED) as scratch:
                save_file(state, scratch, metadata={"format": "pt"})

    def _trained_state(self) -> dict[str, torch.Tensor]:
        """The trained weights by name, whole; under FSDP, on the first process only."""
        model = self.accelerator.unwrap_model(self.model)
        if self._is_sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            whole: dict[str, Any] = get_model_state_dict(model, options=options)
            return {name: value.contiguous() for name, value in whole.items()}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: value.contiguous() for name, value in model.state_dict().items() if name in trained}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.small_checkpoints and self._is_sharded):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        if not path.exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state: dict[str, Any] = load_file(path)
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        if self._is_sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(unwrapped, state, options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            unwrapped.load_state_dict(state, strict=False)
