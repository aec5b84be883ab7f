"""``eval``: benchmarks from the command line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flash_vstream.asking import load_model
from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.endpoint import ChatEndpoint
from flash_vstream.evaluate.items import Benchmark
from flash_vstream.evaluate.judges import EndpointJudge, Judge, OfflineJudge
from flash_vstream.evaluate.report import (
    compare,
    headline,
    judged,
    print_comparison,
    print_report,
    read_predictions,
    summary,
)

DEFAULT_FPS = {"vstream-qa-mini": 2.0}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark called ``name``; raises ``UserError`` with the names there are."""
    if name not in BENCHMARKS:
        raise UserError(
            f"no benchmark is called {name!r}; choose from {', '.join(BENCHMARKS)} (eval list explains each)"
        )
    return BENCHMARKS[name]


def find_judge(benchmark: Benchmark, judge: str, judge_model: str | None) -> Judge:
    """``offline``, ``similarity``, or an endpoint's URL with the model to ask there."""
    if judge == "offline":
        if benchmark.name == "vstream-qa-mini":
            from flash_vstream.evaluate.mini import MiniJudge

            return MiniJudge()
        return OfflineJudge()
    if judge == "similarity":
        from flash_vstream.evaluate.similarity import SimilarityJudge

        return SimilarityJudge()
    if not judge.startswith(("http://", "https://")):
        raise UserError(f"--judge {judge!r} must be offline, similarity, or the URL of an OpenAI-compatible endpoint")
    if not judge_model:
        raise UserError("--judge with a URL needs --judge-model, the model to ask there")
    return EndpointJudge(ChatEndpoint(judge, judge_model, os.environ.get("OPENAI_API_KEY")))


def data_folder(benchmark: Benchmark, data: Path | None) -> Path:
    """Where the benchmark's files are; the mini one is built when no folder is named."""
    if data is not None:
        return data
    if benchmark.name != "vstream-qa-mini":
        raise UserError(f"--data is needed: the folder with {benchmark.title} ({benchmark.source})")
    from flash_vstream.evaluate.mini import build_mini

    with Console(stderr=True).status("building VStream-QA-mini") as status:
        return build_mini(report=status.update)


def evaluate(
    name: str,
    data: Path | None,
    model: str,
    readers: Sequence[str],
    protocol: str | None,
    fps: float | None,
    judge_name: str,
    judge_model: str | None,
    shard: str | None,
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run a benchmark with each reader, judge it, tell of it."""
    from flash_vstream.evaluate.runner import Run, load_items, run_benchmark, sharded

    benchmark = find_benchmark(name)
    judge = find_judge(benchmark, judge_name, judge_model)
    folder = data_folder(benchmark, data)
    items = sharded(load_items(benchmark, folder), shard, limit)
    if not items:
        raise UserError("no question is left after --shard and --limit")
    if output is not None and len(readers) > 1:
        raise UserError("--output takes one reader; name several readers without it")
    loaded = load_model(model)
    reports = []
    for reader in readers:
        run = Run(name, model, reader, protocol or benchmark.protocol, fps or DEFAULT_FPS.get(name, 1.0))
        path = output or Path("runs/eval") / f"{file_name(run.benchmark, model, reader, run.protocol, shard)}.jsonl"
        rows = run_benchmark(run, benchmark, items, folder, loaded, path)
        report = {**summary(judged(rows, judge, path.with_suffix(".judged.jsonl")), judge, benchmark)}
        report["predictions"] = str(path)
        reports.append(report)
        if not as_json and len(readers) == 1:
            print_report(report)
    if as_json:
        print(json.dumps(reports if len(reports) > 1 else reports[0]))
    elif len(reports) > 1:
        print_side_by_side(reports)


def file_name(*parts: str | None) -> str:
    """Parts as one file name: whatever a file system might mind becomes a dash."""
    text = "-".join(part for part in parts if part)
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def print_side_by_side(reports: list[dict[str, Any]]) -> None:
    """Several readers' reports as one table."""
    console = Console(highlight=False)
    for report in reports:
        console.print(headline(report), soft_wrap=True)
    table = Table("kind", "questions", *(report["run"]["reader"] for report in reports))
    for kind, part in reports[0]["kinds"].items():
        table.add_row(kind, str(part["questions"]), *(f"{report['kinds'][kind]['accuracy']:.1%}" for report in reports))
    spans = ("{:.1%} ({:.1%} - {:.1%})".format(report["accuracy"], *report["interval"]) for report in reports)
    table.add_row("all (95%)", str(reports[0]["questions"]), *spans)
    console.print(table)
    if "judge" in reports[0]:
        console.print(f"judge: {reports[0]['judge']}; does not compare with published numbers", style="yellow")


def list_benchmarks(as_json: bool) -> None:
    """What there is: where it comes from, how large it is, how it is scored."""
    if as_json:
        rows = [
            {
                "name": b.name,
                "title": b.title,
                "metric": b.metric,
                "protocol": b.protocol,
                "files": list(b.files),
                "media": list(b.media),
                "source": b.source,
                "size": b.size,
                "licence": b.licence,
                "published": dict(b.published),
            }
            for b in BENCHMARKS.values()
        ]
        print(json.dumps(rows, indent=2))
        return
    console = Console(highlight=False)
    for b in BENCHMARKS.values():
        console.print(f"[bold]{b.name}[/bold]  {b.title}: {b.size}; {b.metric} questions, {b.protocol} by default")
        console.print(f"    from {b.source}; {b.licence}", soft_wrap=True)
        console.print(f"    in --data: {' or '.join(b.files)}; media in {' or '.join(b.media)}", soft_wrap=True)
        for who, value in b.published.items():
            console.print(f"    published: {who}: {value}", style="dim", soft_wrap=True)


def tell_floors(name: str, data: Path | None, as_json: bool) -> None:
    """Constant answers on all of a benchmark's questions."""
    from flash_vstream.evaluate.floors import floors, print_floors
    from flash_vstream.evaluate.runner import load_items

    benchmark = find_benchmark(name)
    report = floors(benchmark, load_items(benchmark, data_folder(benchmark, data)))
    print(json.dumps(report)) if as_json else print_floors(report)


def compare_files(first: Path, second: Path, judge_name: str, judge_model: str | None, as_json: bool) -> None:
    """Two prediction files, judged alike."""
    sides = []
    for path in (first, second):
        rows = read_predictions(path)
        benchmark = find_benchmark(rows[0]["run"]["benchmark"])
        judge = find_judge(benchmark, judge_name, judge_model)
        sides.append(judged(rows, judge, path.with_suffix(".judged.jsonl")))
    result = compare(*sides)
    print(json.dumps(result)) if as_json else print_comparison(result, (str(first), str(second)))
