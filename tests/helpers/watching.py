"""Standing questions without a frame worker: frames are written by the test."""

import time

import torch

from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.messages import Report
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.standing_questions import StandingQuestions
from flash_vstream.live.stream_state import Pictures, empty_slots, stream_state
from flash_vstream.pipeline import FlashVStream


class Shared:
    """A shared state to which frames of random features are written; ``features`` are the newest."""

    def __init__(self, pipeline: FlashVStream, path):
        self.memory, self.kept = pipeline.new_memory(), 0
        self.shared = SharedTensors.create(str(path), state_layout(self.memory))
        self.config = pipeline.model.config
        self.features: torch.Tensor | None = None

    def write(self, at: float, skipped: int = 0, features: torch.Tensor | None = None):
        shape = 1, self.config.pooled_size**2, self.config.vision_config.hidden_size
        self.features = torch.randn(shape) if features is None else features
        self.memory.write(self.features, [at])
        self.kept += 1 + skipped
        state = stream_state(self.memory, empty_slots(self.memory), Pictures.of(self.memory))
        self.shared.publish(state, {"monotonic": time.monotonic(), "kept": self.kept, "time": at})


def work(standing: StandingQuestions) -> list[Report]:
    """Every report until there is nothing to do."""
    found, turns = [], standing.turns()
    while (reports := next(turns)) is not None:
        found += reports
    return found
