"""``bench``: speed, memory, and survival."""

from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.cli.options import Device, Model
from flash_vstream.cli.terminal import clean_end_on_signals


def bench(
    what: Annotated[
        str, typer.Argument(help="memory, nano, all (both), live, soak, efficiency, gpu, compare, chaos.")
    ] = "all",
    frames: Annotated[
        int, typer.Option("--frames", help="Frames written by memory and soak; the maximum for efficiency and gpu.")
    ] = 100_000,
    seconds: Annotated[float, typer.Option("--seconds", help="How long live watches one stream.")] = 600.0,
    model: Model = "nano",
    output: Annotated[
        Path | None, typer.Option("--output", help="Where efficiency and gpu put their plot (PNG or SVG).")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="How long chaos disturbs a server.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", help="What chaos draws its requests, media and kills from.")] = 0,
    device: Device = None,
) -> None:
    """Measure speed and memory, or (chaos) what a server survives; the last line on stdout is JSON.

    compare runs llama.cpp beside nano; it needs `npm install node-llama-cpp` in the current folder.
    chaos starts a server of its own and exits with code 1 if a promise of docs/reliability.md was broken.
    """
    if what == "chaos":
        from flash_vstream.bench.chaos import run_chaos

        with clean_end_on_signals():
            kept = run_chaos(model, minutes, seed)
        if not kept:
            raise typer.Exit(1)
        return
    if what == "gpu":
        from flash_vstream.bench.gpu import run_gpu_bench

        run_gpu_bench("all" if model == "nano" else model, min(frames, 10_000), device, output)
        return
    if what == "compare":
        from flash_vstream.bench.compare import run_compare

        run_compare()
        return
    if what == "efficiency":
        from flash_vstream.bench.efficiency import run_efficiency

        run_efficiency(model, min(frames, 10_000), output)
        return
    from flash_vstream.bench.offline import run_bench

    run_bench(what, frames, seconds, model)
