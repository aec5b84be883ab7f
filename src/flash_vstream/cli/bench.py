"""``bench``: speed and memory."""

from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.cli.options import Device, Model


def bench(
    what: Annotated[str, typer.Argument(help="memory, nano, all (both), live, soak, efficiency or gpu.")] = "all",
    frames: Annotated[
        int, typer.Option("--frames", help="Frames written by memory and soak; the maximum for efficiency and gpu.")
    ] = 100_000,
    seconds: Annotated[float, typer.Option("--seconds", help="How long live watches one stream.")] = 600.0,
    model: Model = "nano",
    output: Annotated[
        Path | None, typer.Option("--output", help="Where efficiency puts its plot (PNG or SVG).")
    ] = None,
    device: Device = None,
) -> None:
    """Measure speed and memory; the last line on stdout is JSON."""
    if what == "gpu":
        from flash_vstream.bench.gpu import run_gpu_bench

        run_gpu_bench("all" if model == "nano" else model, min(frames, 10_000), device)
        return
    if what == "efficiency":
        from flash_vstream.bench.efficiency import run_efficiency

        run_efficiency(model, min(frames, 10_000), output)
        return
    from flash_vstream.bench.offline import run_bench

    run_bench(what, frames, seconds, model)
