"""The STAR memory alone, on features of your own; no model and no video needed.

    python examples/memory_on_your_features.py
    python examples/memory_on_your_features.py features.safetensors

The file holds ``features [T, P², D]`` (a square grid of D channels for each frame) and, optionally, ``times [T]``
in seconds. Without a file, five scenes of random features stand in for your encoder's.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from flash_vstream import StarConfig, StarMemory


def example_features(scenes: int = 5, frames: int = 40, grid: int = 8, channels: int = 64) -> torch.Tensor:
    """Scenes of ``frames`` similar feature maps each: ``[scenes * frames, grid², channels]``."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(scenes, 1, grid**2, channels, generator=generator)
    noise = 0.1 * torch.randn(scenes, frames, grid**2, channels, generator=generator)
    return (centres + noise).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    options = parser.parse_args()

    tensors = load_file(options.file) if options.file else {"features": example_features()}
    features = tensors["features"].float()
    times = tensors.get("times", torch.arange(len(features))).double()

    # The abstract memory needs a trained SemanticAttention; the other three parts need no weights at all.
    config = StarConfig(spatial_size=8, temporal_size=4, temporal_length=5, retrieved_length=2, abstract_length=0)
    memory = StarMemory(config, channels=features.shape[-1])
    empty = memory.nbytes
    for frame, time in zip(features, times, strict=True):  # one frame at a time, as a stream arrives
        memory.write(frame[None], time[None])

    snapshot = memory.read()
    print(f"{snapshot.frames} frames in {len(snapshot.tokens())} tokens; {memory.nbytes - empty} bytes of growth")
    for part, slots in snapshot.parts():
        for start, end, exemplar, weight in zip(slots.start, slots.end, slots.exemplar, slots.weight, strict=True):
            print(f"{part:9}  {start:6.1f}-{end:.1f} s  {int(weight):3} frames, exemplar at {exemplar:.1f} s")


if __name__ == "__main__":
    main()
