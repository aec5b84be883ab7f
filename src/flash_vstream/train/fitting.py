"""The training loop of vision towers and small networks: resumable, and the same from every step on."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from flash_vstream.files import atomic_write

SAVE_EVERY = 100
"""The number of steps between two checkpoints."""
Loss = Callable[[random.Random, torch.Generator], Tensor]


class Schedule(Protocol):
    """The fields of a config that the loop needs."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def seed(self) -> int: ...


def fit(network: nn.Module, name: str, config: Schedule, kept: Path, loss: Loss) -> None:
    """Train ``network`` for the config's steps with AdamW and one cycle of the learning rate.

    ``loss`` gets the random generators of its step. For the rest see ``run_steps``.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    network.train()

    def seeded(rng: random.Random) -> Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        torch.manual_seed(rng.getrandbits(63))  # dropout's
        return loss(rng, generator)

    run_steps(name, config, kept, {"network": network, "optimizer": optimizer, "schedule": schedule}, seeded)


def run_steps(
    name: str,
    config: Schedule,
    kept: Path,
    parts: dict[str, Any],
    loss: Callable[[random.Random], Tensor],
    clip: float = math.inf,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """Take the config's steps, or those after the checkpoint ``kept``, which has the state of all ``parts``.

    Two of these are ``optimizer`` and ``schedule``. ``loss`` gets a random generator that depends on seed and step
    alone, so that a run that goes on draws what an undisturbed one would. ``clip`` is the largest norm of the
    gradients. ``after_step`` gets the number of steps taken, and runs before the checkpoint of this step is written.
    """
    optimizer, begin = parts["optimizer"], 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True, map_location="cpu")
        begin = saved["step"]
        for part_name, part in parts.items():
            part.load_state_dict(saved[part_name])
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=config.steps, completed=begin)
        for step in range(begin, config.steps):
            value = loss(random.Random(f"{config.seed}/{step}"))
            optimizer.zero_grad()
            value.backward()
            if math.isfinite(clip):
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            parts["schedule"].step()
            if after_step is not None:
                after_step(step + 1)
            progress.advance(task)
            if step % 10 == 0:  # to read the loss, the CPU waits for the GPU
                progress.update(task, description=f"{name}, loss {value.item():.2f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
                with atomic_write(kept) as scratch:
                    torch.save({"step": step + 1} | {n: part.state_dict() for n, part in parts.items()}, scratch)
