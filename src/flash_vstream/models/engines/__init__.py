"""What a language model runs on: one interface, and an implementation for each runtime.

An ``Engine`` reads embeddings into ``Sequence`` objects and returns logits; the text around it, such as prompts and
stop tokens, is ``models/generation.py``'s. ``PyTorchEngine`` is the reference and runs wherever PyTorch does.
``OpenVinoEngine`` decodes several times as fast on CPUs.
"""

from flash_vstream.models.engines.base import Engine, Feed, Row, Sequence
from flash_vstream.models.engines.choice import fastest_engine
from flash_vstream.models.engines.pytorch import PyTorchEngine

__all__ = ["Engine", "Feed", "PyTorchEngine", "Row", "Sequence", "fastest_engine"]
