"""What a language model runs on: one interface, and an implementation for each runtime.

An ``Engine`` reads tokens into sequences and returns logits; prompts, stop tokens and text are
``models/generation.py``'s. ``PyTorchEngine`` is the reference and runs wherever PyTorch does. ``OpenVinoEngine``
decodes several times as fast on CPUs, and decodes many sequences together for little more than one.
"""

from flash_vstream.models.engines.base import Engine, Feed, Row
from flash_vstream.models.engines.choice import fastest_engine, speed_up_vision
from flash_vstream.models.engines.pytorch import PyTorchEngine

__all__ = ["Engine", "Feed", "PyTorchEngine", "Row", "fastest_engine", "speed_up_vision"]
