"""``ablate``: the paper's ablations on any benchmark, as one table and a plot."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flash_vstream.cli.options import Data, Json, Model
from flash_vstream.cli.terminal import load_pipeline
from flash_vstream.errors import UserError

if TYPE_CHECKING:
    from flash_vstream.memory import StarConfig


def ablate(
    benchmark: Annotated[str, typer.Argument(help="A benchmark's name (see eval --list).")] = "vstream-qa-mini",
    data: Data = None,
    model: Model = "nano",
    variant: Annotated[list[str] | None, typer.Option("--variant", help="Run only this variant (repeatable).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask at most this many questions.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Where the plot goes (PNG or SVG).")] = None,
    as_json: Json = False,
) -> None:
    """The paper's ablations: each memory part off, other sizes, other consolidation and retrieval."""
    run_ablation(benchmark, data, model, variant or [], limit, output, as_json)


def variants(star: "StarConfig") -> "dict[str, tuple[str, StarConfig]]":
    """Each variant's memory method and configuration, derived from a model's own memory ``star``."""
    half, double = max(2, star.temporal_length // 2), 2 * star.temporal_length
    return {
        "full": ("star", star),
        "no spatial": ("star-spatial", star),
        "no temporal": ("star-temporal", star),
        "no abstract": ("star-abstract", star),
        "no retrieved": ("star-retrieved", star),
        "no times": ("star-times", star),
        f"temporal {half}": ("star", replace(star, temporal_length=half)),
        f"temporal {double}": ("star", replace(star, temporal_length=double)),
        "Lloyd's consolidation": ("star", replace(star, consolidation="lloyd")),
        "buffer retrieval": ("star", replace(star, retrieval="buffer")),
        "recent:4": ("recent:4", star),
        "uniform:8": ("uniform:8", star),
        "blind": ("blind", star),
    }


def run_ablation(
    name: str,
    data: Path | None,
    model_name: str,
    chosen: Sequence[str],
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run every variant on the same questions and print them side by side; resumable like ``eval``."""
    from flash_vstream.evaluate.loading import load_items, sharded
    from flash_vstream.evaluate.plots import check_plot
    from flash_vstream.evaluate.report import judged, summary
    from flash_vstream.evaluate.runner import Run, run_benchmark, weights_hash
    from flash_vstream.evaluate.selection import DEFAULT_FPS, data_folder, file_name, find_benchmark, find_judge

    check_plot(output)
    benchmark = find_benchmark(name)
    folder = data_folder(benchmark, data)
    items = sharded(load_items(benchmark, folder), None, limit)
    judge = find_judge(benchmark, "offline", None, folder)
    pipeline = load_pipeline(model_name)
    available = variants(pipeline.model.config.star)
    for variant in chosen:
        if variant not in available:
            raise UserError(f"no variant is called {variant!r}; choose from {', '.join(available)}")
    weights, engine = weights_hash(pipeline.model), pipeline.generator.engine.name
    reports: dict[str, dict[str, Any]] = {}
    for variant in chosen or available:
        method, star = available[variant]
        settings = (benchmark.protocol, DEFAULT_FPS.get(name, 1.0), star, weights)
        run = Run(name, model_name, method, *settings, engine=engine)
        path = Path("runs/ablate") / f"{file_name(name, model_name, variant)}.jsonl"
        rows = run_benchmark(run, benchmark, items, folder, pipeline, path)
        reports[variant] = summary(judged(rows, judge), judge, benchmark)
    if as_json:
        print(json.dumps(reports), flush=True)
    else:
        tell(reports)
    if output is not None:
        plot(reports, output)


def tell(reports: dict[str, dict[str, Any]]) -> None:
    """Print every variant's accuracy with its interval, and by kind of question."""
    from flash_vstream.evaluate.statistics import format_interval

    kinds = list(next(iter(reports.values()))["kinds"])
    table = Table("variant", "all", "95% interval", *(kinds if len(kinds) > 1 else []))
    for variant, report in reports.items():
        cells = [f"{report['accuracy']:.1%}", format_interval(report["interval"])]
        by_kind = [f"{report['kinds'][kind]['accuracy']:.0%}" for kind in kinds] if len(kinds) > 1 else []
        table.add_row(variant, *cells, *by_kind)
    Console().print(table)


def plot(reports: dict[str, dict[str, Any]], output: Path) -> None:
    """Plot accuracies as bars with their intervals."""
    from flash_vstream.evaluate.plots import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(reports) + 1))
    names = list(reports)[::-1]
    values = [reports[name]["accuracy"] for name in names]
    spans = [reports[name]["interval"] or (value, value) for name, value in zip(names, values, strict=True)]
    low = [value - span[0] for value, span in zip(values, spans, strict=True)]
    high = [span[1] - value for value, span in zip(values, spans, strict=True)]
    axis.barh(names, values, xerr=[low, high], color="#3b5bdb", ecolor="#868e96", capsize=3)
    axis.set(xlabel="accuracy", xlim=(0, 1))
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)
