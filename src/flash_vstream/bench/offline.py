"""``bench``: speed and memory, each figure next to its theoretical limit."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import track

from flash_vstream.errors import UserError
from flash_vstream.memory import SemanticAttention, StarConfig, StarMemory
from flash_vstream.memory.temporal import ClusterMemory

WINDOW = 200
"""Frames per reported median."""


def run_bench(what: str, frames: int, seconds: float, model: str = "nano") -> None:
    """Run the benchmarks named by ``what``; the last line of stdout is JSON.

    ``all`` means memory and nano; live and soak take many minutes and must be named. Only these two
    use ``model``.
    """
    from flash_vstream.bench.live import bench_live, bench_soak

    benches: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: bench_memory(frames),
        "nano": bench_nano,
        "live": lambda: bench_live(seconds, model),
        "soak": lambda: bench_soak(frames, model),
    }
    if what not in (*benches, "all"):
        raise UserError(
            f"no bench is called {what!r}; choose from {', '.join(benches)}, efficiency, gpu, compare, agreement,"
            " chaos, load, scale or all"
        )
    if frames < 4 * WINDOW:
        raise UserError(f"--frames must be at least {4 * WINDOW} to compare early frames with late ones")
    if seconds < 10:
        raise UserError("--seconds must be at least 10 for two questions five seconds apart")
    chosen = ("memory", "nano") if what == "all" else (what,)
    report = {name: benches[name]() for name in chosen}
    console = Console(stderr=True)
    for name, result in report.items():
        console.print(f"[bold]{name}[/bold]")
        for key, value in result.items():
            console.print(f"  {key}: {value:,.4g}" if isinstance(value, float) else f"  {key}: {value}")
    print(json.dumps(report))


def bench_memory(frames: int) -> dict[str, Any]:
    """Time memory updates at the paper's sizes: one thread, float32 frames ``[1, 64, 1024]``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        config = StarConfig()
        memory = StarMemory(config, 1024, SemanticAttention(1024, 32))
        scenes = torch.randn(256, 64, 1024)
        medians: dict[int, float] = {}
        resident = 0
        durations: list[float] = []
        for i in track(range(frames), "writing frames", console=Console(stderr=True)):
            frame = scenes[i * 7919 % 256][None]
            started = time.perf_counter()
            memory.write(frame, [float(i)])
            durations.append(time.perf_counter() - started)
            if i + 1 in (100 + WINDOW, frames // 2, frames):
                medians[i + 1] = 1000 * statistics.median(durations[-WINDOW:])
            if len(durations) > WINDOW:
                durations.pop(0)
            if i == 1000 or (i == WINDOW and frames <= 1000):
                resident = psutil.Process().memory_info().rss
        first, *_, last = medians.values()
        # An update compares two centroids with all of them: read, write the differences, read those.
        moved = 2 * 3 * (config.temporal_length + 1) * config.temporal_size**2 * 1024 * 4
        limit = moved / _read_bandwidth()
        return {
            "ms_per_frame_at": {str(at): round(value, 3) for at, value in medians.items()},
            "late_over_early": round(last / first, 3),
            "limit_ms_bytes_moved_over_bandwidth": round(1000 * limit, 3),
            "memory_bytes": memory.nbytes,
            "resident_growth_bytes": psutil.Process().memory_info().rss - resident,
            "frames": frames,
            "threads": 1,
        }
    finally:
        torch.set_num_threads(threads)


def longterm_milliseconds(slots: int = 512, channels: int = 1280, frames: int = 1200) -> float:
    """The median time of a frame that is merged into a full long-term memory of nano's sizes, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        memory = ClusterMemory(slots, 1, 2, channels, torch.float16)
        scenes = torch.randn(64, 16, channels)
        durations = []
        for i in range(frames):
            started = time.perf_counter()
            memory.merge_in(scenes[i * 7919 % 64], float(i), i)
            durations.append(time.perf_counter() - started)
        return 1000 * statistics.median(durations[-WINDOW:])
    finally:
        torch.set_num_threads(threads)


def bench_nano() -> dict[str, Any]:
    """Measure nano on this machine: encoding, first token, later tokens, process memory."""
    from flash_vstream.bench.live import long_question
    from flash_vstream.models.hub import pull
    from flash_vstream.pipeline import FlashVStream

    folder = pull("nano")
    before = time.perf_counter()
    pipeline = FlashVStream.from_pretrained("nano")
    loaded = time.perf_counter() - before
    size = pipeline.processor.image_processor.size
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(16)]
    stream = pipeline.new_stream()
    for i in range(40):  # fill every slot, and warm up
        stream.write([frames[i % 16]], [float(i)])
    started = time.perf_counter()
    for i in range(60):
        pipeline.encode([frames[i % 16]])
    encode = 60 / (time.perf_counter() - started)
    snapshot = stream.snapshot()
    pipeline.ask(snapshot, long_question(), max_new_tokens=4).finish()
    answers = [pipeline.ask(snapshot, long_question(), max_new_tokens=48).finish() for _ in range(5)]
    prefix = pipeline.generator.read(snapshot)
    warm = [pipeline.ask(prefix, long_question(), max_new_tokens=1).finish() for _ in range(5)]
    work = count_work(folder)
    multiply, read = matrix_rate(pipeline.model.dtype), _read_bandwidth()
    engine = pipeline.generator.engine.name
    bytes_a_token = work.language if engine == "openvino" else 2 * work.language
    return {
        "load_seconds": loaded,
        "encode_frames_per_second": encode,
        "encode_limit_frames_per_second": multiply / work.encoding,
        "prompt_tokens": answers[0].prompt_tokens,
        "first_token_seconds": statistics.median(answer.first_token_seconds or 0.0 for answer in answers),
        "first_token_warm_seconds": statistics.median(answer.first_token_seconds or 0.0 for answer in warm),
        "first_token_limit_seconds": 2 * work.language * answers[0].prompt_tokens / multiply,
        "tokens_per_second": statistics.median(answer.tokens_per_second or 0.0 for answer in answers),
        "tokens_per_second_limit": read / bytes_a_token,
        "process_bytes": psutil.Process().memory_info().rss,
        "engine": engine,
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matrix_operations_per_second": multiply,
        "read_bytes_per_second": read,
    }


@dataclass(frozen=True)
class Work:
    """What a model asks of a machine, as its architecture alone tells.

    ``encoding`` are the floating-point operations of a frame in the vision tower, ``language`` the language model's
    parameters: a token takes two operations with each.
    """

    encoding: float
    language: int


def count_work(folder: Path) -> Work:
    """The work of the model in ``folder``, whichever engines run it: without weights, and without running it."""
    from torch.utils.flop_counter import FlopCounterMode

    from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration

    config = FlashVStreamConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = FlashVStreamForConditionalGeneration(config)
        size = config.vision_config.image_size
        with FlopCounterMode(display=False) as counter:
            model.encode(torch.zeros(1, 3, size, size))
    language = sum(parameter.numel() for parameter in model.language_model.parameters())
    return Work(float(counter.get_total_flops()), language)


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
    return 2 * 1536**3 / _best(lambda: a @ b)


def _read_bandwidth() -> float:
    """Bytes per second when reading uncached memory."""
    values = torch.zeros(64 * 2**20)
    return values.numel() * 4 / _best(values.sum)


def _best(work: Callable[[], Any], tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
