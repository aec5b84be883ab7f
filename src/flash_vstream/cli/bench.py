"""``bench``: speed, memory, and survival."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.cli.options import Model
from flash_vstream.cli.terminal import clean_end_on_signals
from flash_vstream.errors import UserError


def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="memory, nano, all (both), live, soak, efficiency, gpu, compare, agreement, chaos, load, scale."
        ),
    ] = "all",
    frames: Annotated[
        int, typer.Option("--frames", help="Frames written by memory and soak; the maximum for efficiency and gpu.")
    ] = 100_000,
    seconds: Annotated[
        float, typer.Option("--seconds", help="How long live watches one stream, and load asks (at most 600).")
    ] = 600.0,
    model: Model = "nano",
    output: Annotated[
        Path | None, typer.Option("--output", help="Where efficiency and gpu put their plot (PNG or SVG).")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="How long chaos disturbs a server.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", help="What chaos draws its requests, media and kills from.")] = 0,
    server: Annotated[str, typer.Option("--server", help="The server that load asks.")] = "http://127.0.0.1:8000",
    streams: Annotated[int, typer.Option("--streams", min=1, help="How many streams load creates.")] = 4,
    fps: Annotated[float, typer.Option("--fps", help="Frames per second of each of them.")] = 1.0,
    rate: Annotated[float, typer.Option("--rate", help="Questions a second that load asks.")] = 0.5,
    data: Annotated[
        Path | None, typer.Option("--data", help="Annotated pictures for agreement, as for eval pictures.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="How many of them agreement asks about.")] = 20,
    device: Annotated[str | None, typer.Option("--device", help="Where gpu and scale run: cpu, cuda, cuda:1.")] = None,
) -> None:
    """Measure speed and memory, or (chaos) what a server survives; the last line on stdout is JSON.

    load needs a running server, which may watch the demo's clips: serve --allow-folder ~/.cache/flash-vstream.
    scale says what 100, 10,000 and a million streams need, from what one costs here.
    compare runs llama.cpp beside nano; it needs `npm install node-llama-cpp` in the current folder.
    agreement asks the default engine and PyTorch in float32 the same questions about annotated pictures.
    chaos starts a server of its own and exits with code 1 if a promise of docs/reliability.md was broken.
    """
    if device is not None and what not in ("gpu", "scale"):
        raise UserError(f"--device is for bench gpu and bench scale; bench {what} runs where the model runs by default")
    if model != "nano" and what in ("compare", "memory", "nano", "all"):
        raise UserError(f"bench {what} measures nano alone; leave --model out")
    if what == "chaos":
        from flash_vstream.bench.chaos import run_chaos

        with clean_end_on_signals():
            kept = run_chaos(model, minutes, seed)
        if not kept:
            raise typer.Exit(1)
        return
    if what == "load":
        from flash_vstream.bench.load import run_load

        found = run_load(server, streams, fps, rate, min(seconds, 600.0), os.environ.get("FLASH_VSTREAM_TOKEN"))
        print(json.dumps(found))
        return
    if what == "scale":
        from flash_vstream.bench.scale import Site, run_scale
        from flash_vstream.models.choice import ModelChoice

        print(json.dumps(run_scale(ModelChoice(model, device), Site(fps))))
        return
    if what == "gpu":
        from flash_vstream.bench.gpu import run_gpu_bench

        run_gpu_bench("all" if model == "nano" else model, min(frames, 10_000), device, output)
        return
    if what == "compare":
        from flash_vstream.bench.compare import run_compare

        run_compare()
        return
    if what == "agreement":
        from flash_vstream.bench.agreement import run_agreement

        if data is None:
            raise UserError("bench agreement needs --data FOLDER with annotated pictures, as for eval pictures")
        run_agreement(data, pictures, model)
        return
    if what == "efficiency":
        from flash_vstream.bench.efficiency import run_efficiency

        run_efficiency(model, min(frames, 10_000), output)
        return
    from flash_vstream.bench.offline import run_bench

    run_bench(what, frames, seconds, model)
