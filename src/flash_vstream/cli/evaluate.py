"""``eval``: benchmarks, and measurements of what a model understands of streams."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.cli.options import Attn, Bits, Data, Device, Dtype, Json, Model, Pair
from flash_vstream.cli.terminal import load_pipeline
from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice

app = typer.Typer(help="Run benchmarks and measure what a model knows about streams.")
# Spelled out, since importing the benchmarks imports torch, which --help should not wait for.
BENCHMARK_NAMES = (
    *("vs-ego", "vs-movie", "rvs-ego", "rvs-movie", "vstream-qa-mini", "clips", "activitynet-qa", "nextqa", "msvd-qa"),
    *("msrvtt-qa", "egoschema", "mlvu", "lvbench", "mvbench", "videomme", "videomme-subtitles", "ovobench"),
    *("streamingbench", "streamingbench-omni", "streamingbench-sqa", "streamingbench-proactive"),
)
Judge = Annotated[str, typer.Option("--judge", help="offline, similarity, or an OpenAI-compatible endpoint's URL.")]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="The model to ask at the judge's URL.")]


def _add_benchmark(name: str) -> None:
    @app.command(name, help="Run this benchmark." if name != "vstream-qa-mini" else "Run it; needs no data.")
    def run(
        data: Data = None,
        model: Model = "nano",
        method: Annotated[
            list[str] | None,
            typer.Option(
                "--memory", help="star, recent:N, uniform:N, blind, … (repeatable; streaming: star and recent:4)"
            ),
        ] = None,
        protocol: Annotated[str | None, typer.Option("--protocol", help="causal, clip or whole.")] = None,
        fps: Annotated[float | None, typer.Option("--fps", help="Frames per second to watch.")] = None,
        choice_by: Annotated[
            str, typer.Option("--choice-by", help="reply: read the model's reply; likelihood: the likeliest option.")
        ] = "reply",
        judge: Judge = "offline",
        judge_model: JudgeModel = None,
        shard: Annotated[str | None, typer.Option("--shard", help="i/n: run only this part of the videos.")] = None,
        limit: Annotated[int | None, typer.Option("--limit", min=1, help="Ask at most this many questions.")] = None,
        output: Annotated[Path | None, typer.Option("--output", help="Where predictions go (JSONL).")] = None,
        device: Device = None,
        dtype: Dtype = None,
        attn: Attn = None,
        bits: Bits = None,
        pair: Pair = None,
        compat: Annotated[
            str, typer.Option("--compat", help="release: the memory of the authors' released code.")
        ] = "none",
        as_json: Json = False,
    ) -> None:
        methods = method or default_memories(name, output)
        choice = ModelChoice(model, device, dtype, attn, bits, pair=pair, compat=compat)
        evaluate(
            name, data, choice, methods, protocol, fps, choice_by, judge, judge_model, shard, limit, output, as_json
        )


for _name in BENCHMARK_NAMES:
    _add_benchmark(_name)


def default_memories(name: str, output: Path | None) -> list[str]:
    """The memory alone or, for a streaming benchmark, with the strongest simple baseline beside it."""
    from flash_vstream.evaluate.selection import find_benchmark

    return ["star", "recent:4"] if find_benchmark(name).is_streaming and output is None else ["star"]


@app.command("list")
def eval_list(as_json: Json = False) -> None:
    """Explain every benchmark: what to download, layout, size, licence, metric, published results."""
    from flash_vstream.evaluate.report import print_benchmarks

    print_benchmarks(as_json)


@app.command("constant-baselines")
def eval_constant_baselines(
    name: Annotated[str, typer.Argument(metavar="BENCHMARK")], data: Data = None, as_json: Json = False
) -> None:
    """Score answers that ignore the video: constants, the majority answer, a uniform guess."""
    report_constant_baselines(name, data, as_json)


@app.command("compare")
def eval_compare(
    first: Annotated[Path, typer.Argument(metavar="A.jsonl")],
    second: Annotated[Path, typer.Argument(metavar="B.jsonl")],
    data: Data = None,
    judge: Judge = "offline",
    judge_model: JudgeModel = None,
    as_json: Json = False,
) -> None:
    """Compare two runs on the same questions: paired bootstrap, and which questions flipped."""
    compare_files(first, second, data, judge, judge_model, as_json)


@app.command("skills")
def eval_skills(
    data: Annotated[Path, typer.Option("--data", help="A folder made by train prepare.")],
    model: Model = "nano",
    method: Annotated[list[str] | None, typer.Option("--memory", help="star, recent:4, … (repeatable)")] = None,
    scenes: Annotated[tuple[int, int], typer.Option("--scenes", help="Fewest and most scenes of a stream.")] = (1, 16),
    frames: Annotated[tuple[int, int], typer.Option("--frames", help="Fewest and most frames of a scene.")] = (2, 6),
    streams: Annotated[int, typer.Option("--streams", min=1)] = 100,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Questions on each stream.")] = 10,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Ask about streams composed of unseen pictures: occurrence, order, time, descriptions, and baselines."""
    from flash_vstream.evaluate.skills import print_skills, run_skills

    for name, (fewest, most) in {"--scenes": scenes, "--frames": frames}.items():
        if not 1 <= fewest <= most:
            raise UserError(f"{name} {fewest} {most} must be the fewest, at least 1, and then the most")
    methods = method or ["star", "recent:4", "uniform:8", "blind"]
    report = run_skills(data, model, methods, scenes, streams, questions, seed, frames)
    print(json.dumps(report)) if as_json else print_skills(report)


@app.command("pictures")
def eval_pictures(
    data: Annotated[Path, typer.Option("--data", help="Folder with pictures, splits.json and annotations.jsonl.")],
    model: Model = "nano",
    split: Annotated[str, typer.Option("--split")] = "val",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many pictures.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Ask about single annotated pictures: presence, people, counts, short questions, descriptions."""
    from flash_vstream.evaluate.pictures import print_pictures, run_pictures

    report = run_pictures(data, model, split, limit, seed)
    print(json.dumps(report)) if as_json else print_pictures(report)


@app.command("watches")
def eval_watches(
    data: Annotated[Path, typer.Option("--data", help="Annotated pictures with splits.json, or clips without one.")],
    model: Model = "nano",
    split: Annotated[str, typer.Option("--split", help="Of pictures; every third group of clips is held out.")] = "val",
    streams: Annotated[int, typer.Option("--streams", min=1, help="How many streams of ten scenes.")] = 8,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Wait for events in streams of held-out scenes: precision, recall and delay, and of asking every second."""
    from flash_vstream.bench.watches import print_watches, run_watches

    report = run_watches(data, model, split, streams, seed)
    print(json.dumps(report)) if as_json else print_watches(report)


@app.command("captions")
def eval_captions(
    data: Annotated[Path, typer.Option("--data", help="A prepared folder.")],
    model: Model = "nano",
    split: Annotated[str, typer.Option("--split")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Score only this many pictures.")] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the search; 1 is greedy.")] = 1,
    as_json: Json = False,
) -> None:
    """Caption single pictures of a prepared split and score them with BLEU-4."""
    from flash_vstream.evaluate.captioning import score_captions

    result = score_captions(data, model, split, limit, beams)
    print(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))


@app.callback(invoke_without_command=True)
def _eval(
    context: typer.Context,
    explain: Annotated[bool, typer.Option("--list", help="Explain every benchmark.")] = False,
    as_json: Json = False,
) -> None:
    if explain:
        eval_list(as_json)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def evaluate(
    name: str,
    data: Path | None,
    model: str | ModelChoice,
    methods: Sequence[str],
    protocol: str | None,
    fps: float | None,
    choice_by: str,
    judge_name: str,
    judge_model: str | None,
    shard: str | None,
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run a benchmark with each memory, judge the answers and print the results."""
    from flash_vstream.evaluate.loading import load_items, sharded
    from flash_vstream.evaluate.report import judged, print_report, print_side_by_side, summary
    from flash_vstream.evaluate.runner import CHOOSING, Run, run_benchmark, weights_hash
    from flash_vstream.evaluate.selection import DEFAULT_FPS, data_folder, file_name, find_benchmark, find_judge

    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"--fps {fps:g} must be above 0")
    if choice_by not in CHOOSING:
        raise UserError(f"--choice-by {choice_by!r} must be {' or '.join(CHOOSING)}")
    benchmark = find_benchmark(name)
    folder = data_folder(benchmark, data)
    judge = find_judge(benchmark, judge_name, judge_model, folder)
    items = sharded(load_items(benchmark, folder), shard, limit)
    if not items:
        raise UserError("no question is left after --shard and --limit")
    if output is not None and len(methods) > 1:
        raise UserError("--output takes one memory; name several memories without it")
    pipeline = load_pipeline(model)
    weights, engine = weights_hash(pipeline.model), pipeline.generator.engine.name
    reports = []
    for method in methods:
        run = Run(
            name,
            str(model),
            method,
            protocol or benchmark.protocol,
            fps or DEFAULT_FPS.get(name, 1.0),
            pipeline.model.config.star,
            weights,
            choice_by,
            engine,
        )
        parts = (run.benchmark, str(model), method, run.protocol, choice_by if choice_by != "reply" else None, shard)
        path = output or Path("runs/eval") / f"{file_name(*parts)}.jsonl"
        rows = run_benchmark(run, benchmark, items, folder, pipeline, path)
        report = {**summary(judged(rows, judge, path.with_suffix(".judged.jsonl")), judge, benchmark)}
        report["predictions"] = str(path)
        reports.append(report)
        if not as_json and len(methods) == 1:
            print_report(report)
    if as_json:
        print(json.dumps(reports if len(reports) > 1 else reports[0]))
    elif len(reports) > 1:
        print_side_by_side(reports)


def report_constant_baselines(name: str, data: Path | None, as_json: bool) -> None:
    """Score constant answers on all of a benchmark's questions, and print the results."""
    from flash_vstream.evaluate.constant_baselines import constant_baselines, print_constant_baselines
    from flash_vstream.evaluate.loading import load_items
    from flash_vstream.evaluate.selection import data_folder, find_benchmark

    benchmark = find_benchmark(name)
    report = constant_baselines(benchmark, load_items(benchmark, data_folder(benchmark, data)))
    print(json.dumps(report)) if as_json else print_constant_baselines(report)


def compare_files(
    first: Path, second: Path, data: Path | None, judge_name: str, judge_model: str | None, as_json: bool
) -> None:
    """Compare two prediction files under the same judge, and print the result."""
    from flash_vstream.evaluate.records import read_predictions
    from flash_vstream.evaluate.report import compare, judged, print_comparison
    from flash_vstream.evaluate.selection import find_benchmark, find_judge

    sides = []
    for path in (first, second):
        rows = read_predictions(path)
        if not rows:
            raise UserError(f"{path} holds no predictions")
        benchmark = find_benchmark(rows[0]["run"]["benchmark"])
        judge = find_judge(benchmark, judge_name, judge_model, data)
        sides.append(judged(rows, judge, path.with_suffix(".judged.jsonl")))
    result = compare(*sides)
    print(json.dumps(result)) if as_json else print_comparison(result, (str(first), str(second)))
