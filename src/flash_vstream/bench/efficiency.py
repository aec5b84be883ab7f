"""``bench efficiency``: the cost of a question as the number of frames grows, for several memory methods.

Reproduces the paper's efficiency figure on one machine and one model. Each measurement runs in its own
process, so that its peak memory is not affected by the others.
"""

import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.plots import check_plot, pyplot
from flash_vstream.pipeline import FlashVStream

MEMORY_METHODS = ("star", "uniform:8", "all")
COUNTS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
QUESTION = "What is happening now?"
TOKENS = 16
CELL_SECONDS = 240.0
"""A measurement that takes longer is reported as not measured, as are longer streams with the same memory."""


def run_efficiency(model: str, most: int, output: Path | None) -> None:
    """Measure, print a table, plot to ``output``; JSON on the last line of stdout."""
    check_plot(output)
    FlashVStream.from_pretrained(model)  # fail here, before any process starts, if the model does not load
    counts = [count for count in COUNTS if count <= most]
    rows: list[dict[str, Any]] = []
    given_up: set[str] = set()
    cells = [(method, count) for method in MEMORY_METHODS for count in counts]
    for method, count in track(cells, "measuring", console=Console(stderr=True)):
        figures = None if method in given_up else _in_own_process(model, method, count)
        if figures is None:
            given_up.add(method)
        rows.append({"memory": method, "frames": count, **(figures or {"measured": False})})
    _print_table(rows)
    print(json.dumps({"efficiency": rows, "question_tokens": TOKENS}), flush=True)
    if output is not None:
        plot(rows, output)


def _in_own_process(model: str, method: str, count: int) -> dict[str, Any] | None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(model, method, count, theirs))
    process.start()
    theirs.close()
    try:
        figures: dict[str, Any] | None = ours.recv() if ours.poll(CELL_SECONDS) else None
    except EOFError:  # out of memory, most likely
        figures = None
    process.kill()
    process.join()
    return figures


def _measure(model_name: str, memory: str, count: int, pipe: Connection) -> None:
    """Measure a question after ``count`` frames of changing scenes (random features) and send the figures.

    Times are medians of three questions, or of one beyond 1,000 frames.
    """
    pipeline = FlashVStream.from_pretrained(model_name)
    config = pipeline.model.config
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(64, config.pooled_size**2, config.vision_config.hidden_size, generator=generator)
    method = MemoryMethod(memory, pipeline.model)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    for i in range(count):
        method.write(float(i), scenes[(i // 5) % 64])
    writing = time.perf_counter() - started
    pipeline.ask(None, QUESTION, max_new_tokens=2).finish()  # warm
    firsts, wholes, peak = [], [], 0
    for _ in range(3 if count <= 1000 else 1):
        started = time.perf_counter()
        answer = pipeline.ask(method.snapshot(), QUESTION, max_new_tokens=TOKENS)
        for _ in answer:
            peak = max(peak, psutil.Process().memory_info().rss)
        wholes.append(time.perf_counter() - started)
        firsts.append(wholes[-1] if answer.first_token_seconds is None else answer.first_token_seconds)
    pipe.send(
        {
            "measured": True,
            "first_token_seconds": statistics.median(firsts),
            "whole_seconds": statistics.median(wholes),
            "write_ms_per_frame": 1000 * writing / count,
            "prompt_tokens": answer.prompt_tokens,
            "peak_bytes": peak,
            "grown_bytes": peak - before,
        }
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("memory", "frames", "prompt tokens", "first token", "whole answer", "peak memory")
    for row in rows:
        cells = [row["memory"], f"{row['frames']:,}"]
        if row["measured"]:
            cells += [f"{row['prompt_tokens']:,}", f"{row['first_token_seconds']:.3f} s"]
            cells += [f"{row['whole_seconds']:.2f} s", f"{row['peak_bytes'] / 2**30:.2f} GiB"]
        else:
            cells.append("not measured: too long or too large")
        table.add_row(*cells)
    Console(stderr=True).print(table)


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    """Plot first token, whole answer (log scale) and peak memory against the number of frames (log scale)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    values: dict[str, tuple[str, float]] = {
        "first token, s": ("first_token_seconds", 1),
        "whole answer, s": ("whole_seconds", 1),
        "peak memory, GiB": ("peak_bytes", 2**30),
    }
    for axis, (title, (name, unit)) in zip(axes, values.items(), strict=True):
        for method in dict.fromkeys(row["memory"] for row in rows):
            own = [row for row in rows if row["memory"] == method and row["measured"]]
            axis.plot([row["frames"] for row in own], [row[name] / unit for row in own], marker="o", label=method)
        axis.set(xscale="log", xlabel="frames seen", title=title)
        axis.grid(alpha=0.3)
    *times, memory = axes
    if any(row["measured"] for row in rows):
        for axis in times:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    memory.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)
