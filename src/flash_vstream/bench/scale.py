"""``bench scale``: what a stream and a question cost on this machine, and what that means for many of them.

The costs are measured; ``needs`` is arithmetic. It assumes that work spreads evenly over workers, and that a resource
is used up at four fifths: beyond that, queues grow faster than the work.
"""

import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flash_vstream.live.frame_worker import state_layout
from flash_vstream.live.hosts import Published
from flash_vstream.live.published import save_state
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import Pictures, max_slots, slot_table, stream_state
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.engines.vllm_prompts import encoded
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.models.interface import Memory
from flash_vstream.models.modeling import FlashVStreamForConditionalGeneration
from flash_vstream.pipeline import FlashVStream

FULL = 0.8
"""The share of a resource that may be used."""
FRAMES, TOGETHER, TOKENS = 8, 16, 24
REPEATS = 5
QUESTION = "What is happening now?"
STREAMS = (100, 10_000, 1_000_000)


@dataclass(frozen=True)
class Costs:
    """What one stream and one question cost: processor seconds of one core on a CPU, seconds on a GPU; best of several.

    ``frame_seconds`` of a frame worker: encoding, in a batch, and writing and publishing. ``question_seconds`` of a
    question worker among sixteen questions at once: a memory read anew, and its share of every step. ``state_bytes``
    are what is published of a stream, ``snapshot_seconds`` what a server's process needs to take and save one, and
    ``copy_seconds`` what a question worker needs to take one. ``prompt_bytes`` is a prompt as vLLM takes it (None where
    it cannot).
    """

    frame_seconds: float
    question_seconds: float
    state_bytes: int
    snapshot_seconds: float
    copy_seconds: float
    prompt_bytes: int | None


@dataclass(frozen=True)
class Site:
    """What is asked of a site, and what its machines have.

    ``frame_workers`` and ``question_workers`` are those of one machine. A question worker takes a new copy of a state
    for each question.
    """

    fps: float = 1.0
    questions_a_minute: float = 0.1
    snapshot_every: float = 10.0
    network_bytes: float = 1.25e9
    disk_bytes: float = 1e9
    frame_workers: int = 1
    question_workers: int = 1


def needs(costs: Costs, site: Site, streams: int) -> dict[str, Any]:
    """How many workers and machines ``streams`` need, and the load of the one server: above 1 it is too much."""
    asked = streams * site.questions_a_minute / 60
    frames = _whole(streams * site.fps * costs.frame_seconds / FULL)
    questions = _whole(asked * (costs.question_seconds + costs.copy_seconds) / FULL)
    machines = max(_whole(frames / site.frame_workers), _whole(questions / site.question_workers))
    snapshots = streams / site.snapshot_every
    server = {
        "processor": snapshots * costs.snapshot_seconds / FULL,
        "network": snapshots * costs.state_bytes / (FULL * site.network_bytes),
        "disk": snapshots * costs.state_bytes / (FULL * site.disk_bytes),
    }
    return {
        "streams": streams,
        "frame_workers": frames,
        "question_workers": questions,
        "machines": machines,
        "state_gigabytes": streams * 2 * costs.state_bytes / 1e9,  # what is published has two places
        "machine_network": asked * costs.state_bytes / max(1, machines) / site.network_bytes,
        "server": server,
        "servers": _whole(max(server.values())),
        "breaks_first": max(server, key=lambda name: server[name]),
    }


def _whole(amount: float) -> int:
    return max(1, -int(-amount // 1))


def run_scale(model: ModelChoice, site: Site) -> dict[str, Any]:
    """Measure a model's costs here and say what 100, 10,000 and a million streams need."""
    torch.set_num_threads(1)  # before loading, since engines take as many: a worker is then one core
    with Console(stderr=True).status(f"measuring {model}"):
        costs = measured(FlashVStream.from_pretrained(model))
    found = [needs(costs, site, streams) for streams in STREAMS]
    table = Table("streams", "frame workers", "question workers", "machines", "servers", "a server's limit")
    for each in found:
        whole = [f"{each[name]:,}" for name in ("streams", "frame_workers", "question_workers", "machines", "servers")]
        table.add_row(*whole, each["breaks_first"])
    Console(stderr=True).print(table)
    return {"model": str(model), "costs": asdict(costs), "site": asdict(site), "needs": found}


def measured(pipeline: FlashVStream) -> Costs:
    """A model's costs on this machine."""
    memory, features = _full_memory(pipeline)
    side = pipeline.processor.image_processor.size
    pictures = [torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy() for _ in range(FRAMES)]
    clock = _Clock(pipeline.model.device.type)
    encode = clock.best(lambda: pipeline.encode(pictures)) / FRAMES
    with tempfile.TemporaryDirectory() as folder:
        shared = SharedTensors.create(f"{folder}/state", state_layout(memory))
        end = memory.read().time

        def write(number: int) -> None:
            memory.write(features[number % len(features)][None], [end + 1 + number])
            slots = slot_table(memory.read(), max_slots(memory))
            notes = {"monotonic": time.monotonic(), "clock": time.time(), "position": None}
            shared.publish(stream_state(memory, slots, Pictures.of(memory)), notes)

        written = min(clock.timed(lambda n=n: write(n)) for n in range(4 * REPEATS))  # type: ignore[misc]
        tensors, notes = shared.read_raw() or ({}, {})
        sent = pickle.dumps(Published(("host", 1), tensors, notes, time.monotonic()), protocol=5)
        copy = clock.best(lambda: shared.read_raw()) + clock.best(lambda: pickle.loads(sent))
        save = clock.best(lambda: save_state(shared, Path(folder) / "saved.safetensors"))
    question, prompt = _question(pipeline, memory, clock)
    size = sum(value.data.nbytes for value in tensors.values())
    return Costs(encode + written, question, size, copy + save, copy, prompt)


def _full_memory(pipeline: FlashVStream) -> tuple[Memory, torch.Tensor]:
    """A memory whose every part is full, and features for more frames."""
    memory, shape = pipeline.new_memory(), pipeline.model.feature_shape
    features = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0)).to(pipeline.model.device)
    star = memory.config
    longest = max(star.longterm_length, star.temporal_length, star.abstract_length, star.spatial_length)
    for second in range(longest + 8):
        memory.write(features[second % 64][None], [float(second)])
    return memory, features


def _question(pipeline: FlashVStream, memory: Memory, clock: "_Clock") -> tuple[float, int | None]:
    """The seconds of one of ``TOGETHER`` questions about as many memories, and the bytes of its prompt for vLLM."""
    generator = pipeline.generator
    snapshot = memory.read()
    read = clock.best(lambda: generator.read(snapshot))
    prefix = generator.read(snapshot)

    def answer() -> None:
        answers = [generator.ask(prefix, QUESTION, max_new_tokens=TOKENS) for _ in range(TOGETHER)]
        for each in answers:
            generator.begin(each)
        while still := [each for each in answers if generator.is_open(each)]:
            generator.advance(still)

    return read + clock.best(answer) / TOGETHER, _prompt_bytes(pipeline, generator, memory)


def _prompt_bytes(pipeline: FlashVStream, generator: AnswerGenerator, memory: Memory) -> int | None:
    if not isinstance(pipeline.model, FlashVStreamForConditionalGeneration):
        return None
    ids, features = generator.prompt(memory.read(), QUESTION)
    given = [] if features is None else [features]
    with torch.inference_mode():
        embeds = pipeline.model.embed(torch.tensor([ids], device=pipeline.model.device), given)[0].cpu()
    return len(encoded(embeds))


class _Clock:
    """Processor time on a CPU, which other work on the machine does not lengthen; time on a GPU, which works alone."""

    def __init__(self, device: str):
        self._device = device
        self._now = time.process_time if device == "cpu" else time.perf_counter

    def timed(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes, in seconds."""
        started = self._now()
        work()
        if self._device == "cuda":
            torch.cuda.synchronize()  # it computes on after calls have returned
        return self._now() - started

    def best(self, work: Callable[[], object]) -> float:
        """The shortest of several tries, in seconds."""
        return min(self.timed(work) for _ in range(REPEATS))
