"""The training loop of the small networks beside a language model: resumable, and the same from every step on."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from flash_vstream.files import atomic_write

SAVE_EVERY = 250
Loss = Callable[[random.Random, torch.Generator], Tensor]


class Schedule(Protocol):
    """What of a config the loop needs."""

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

    ``loss`` gets the random generators of its step, which depend on seed and step alone, so that a run that goes on
    from the checkpoint ``kept`` draws what an undisturbed one would.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        begin = saved["step"]
        for part_name, part in parts.items():
            part.load_state_dict(saved[part_name])
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=config.steps, completed=begin)
        network.train()
        for step in range(begin, config.steps):
            rng = random.Random(f"{config.seed}/{step}")
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            torch.manual_seed(rng.getrandbits(63))  # dropout's
            value = loss(rng, generator)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"{name}, loss {value.item():.2f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
                with atomic_write(kept) as scratch:
                    torch.save({"step": step + 1} | {n: part.state_dict() for n, part in parts.items()}, scratch)
