"""The command line: one verb a function, thin."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flash_vstream.errors import UserError

app = typer.Typer(
    name="flash-vstream",
    help="Watch a video stream of any length in constant memory, and answer questions about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train a model: prepare data, stage 1, stage 2.", no_args_is_help=True)
eval_app = typer.Typer(help="Run benchmarks and measure what a model knows about streams.")
# The modules behind these names import torch, which --help should not wait for.
BENCHMARK_NAMES = (
    *("vs-ego", "vs-movie", "rvs-ego", "rvs-movie", "vstream-qa-mini", "activitynet-qa", "nextqa", "msvd-qa"),
    *("msrvtt-qa", "egoschema", "mlvu", "lvbench", "mvbench", "videomme", "ovobench", "streamingbench"),
)
vstream_qa_app = typer.Typer(help="Make a benchmark like VStream-QA of videos of one's own.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(vstream_qa_app, name="vstream-qa")
app.add_typer(eval_app, name="eval")

Model = Annotated[str, typer.Option("--model", help="A name of the zoo, a model folder or a Hugging Face id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Fps = Annotated[float, typer.Option("--fps", help="Frames to look at in a second of stream time.")]


def main() -> None:
    """Run the command line; a user's error is one message on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"flash-vstream: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # such as: flash-vstream ask … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from flash_vstream import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def ask(
    video: Annotated[str, typer.Argument(help="A video file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One question or several.")],
    at: Annotated[list[str] | None, typer.Option("--at", help="Stream time to ask at, such as 35s or 1:05.")] = None,
    fps: Fps = 1.0,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Watch a video file and answer questions about it, from the memory as of --at (default: its end)."""
    from flash_vstream.asking import ask_file

    ask_file(video, questions, at or [], fps, model, as_json)


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="A file, rtsp://…, http(s)://…, /dev/video0, a folder, or -.")],
    fps: Fps = 1.0,
    model: Model = "nano",
    loop: Annotated[bool, typer.Option("--loop", help="Begin a file again at its end.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Read a file as fast as possible, not at its own pace.")] = False,
    transport: Annotated[str, typer.Option("--transport", help="RTSP over tcp or udp.")] = "tcp",
) -> None:
    """Watch a live source and answer questions as they are typed, while frames go on being read."""
    from flash_vstream.watching import watch as watch_live

    watch_live(source, fps, model, loop, fast, transport)


@app.command()
def serve(
    stream: Annotated[
        list[str] | None, typer.Option("--stream", help="NAME=SOURCE to watch from the start (several allowed).")
    ] = None,
    model: Model = "nano",
    host: Annotated[str, typer.Option("--host", help="Beyond loopback FLASH_VSTREAM_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    fps: Fps = 1.0,
    state: Annotated[Path | None, typer.Option("--state", help="Folder to keep memories and answers in.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Web origin whose pages may call.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Private host that sources may name.")] = None,
    allow_folder: Annotated[list[Path] | None, typer.Option(help="Folder whose files sources may name.")] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line of JSON on stderr for each.")] = False,
) -> None:
    """Serve the HTTP API and the web page."""
    from flash_vstream.serving import serve as run

    run(
        host,
        port,
        model,
        stream or [],
        fps,
        state,
        allow_origin or [],
        allow_host or [],
        allow_folder or [],
        log_requests,
    )


@app.command()
def demo(as_json: Json = False) -> None:
    """Watch a short real video (a street, a man in a car, a cartoon) and answer three questions about it."""
    from flash_vstream.demo import run_demo

    run_demo(as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models: what they are, whether they are here, sizes and licences."""
    from flash_vstream.models.zoo import ZOO, assembled

    folders = {name: assembled(name) for name in ZOO}
    if as_json:
        rows = [{**vars(m), "present": folders[m.name].exists(), "folder": str(folders[m.name])} for m in ZOO.values()]
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "what it is", "here", "size", "licence", "from")
    for model in ZOO.values():
        here = "yes" if folders[model.name].exists() else "no"
        table.add_row(model.name, model.summary, here, f"{model.megabytes:,} MB", model.licence, model.source)
    Console().print(table)


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A name of the zoo.")], as_json: Json = False) -> None:
    """Fetch and assemble a model ahead of time."""
    from flash_vstream.models.zoo import pull as pull_model

    with Console(stderr=True).status(f"looking for {name}") as status:
        folder = pull_model(name, status.update)
    print(json.dumps({"name": name, "folder": str(folder)}) if as_json else f"{name} is at {folder}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="memory, nano, all (both), live, soak or efficiency.")] = "all",
    frames: Annotated[
        int, typer.Option("--frames", help="Frames that memory and soak write, efficiency's most.")
    ] = 100_000,
    seconds: Annotated[float, typer.Option("--seconds", help="How long live watches one stream.")] = 600.0,
    model: Model = "nano",
    output: Annotated[
        Path | None, typer.Option("--output", help="Where efficiency puts its plot (PNG or SVG).")
    ] = None,
) -> None:
    """Measure speed and memory; the last line on stdout is JSON."""
    if what == "efficiency":
        from flash_vstream.evaluate.efficiency import run_efficiency

        run_efficiency(model, min(frames, 10_000), output)
        return
    from flash_vstream.bench import run_bench

    run_bench(what, frames, seconds, model)


@app.command()
def ablate(
    benchmark: Annotated[str, typer.Argument(help="A benchmark's name (see eval --list).")] = "vstream-qa-mini",
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the annotations and media.")] = None,
    model: Model = "nano",
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Only these variants (several allowed).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many questions at most.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Where the plot goes (PNG or SVG).")] = None,
    as_json: Json = False,
) -> None:
    """The paper's ablations: each memory part off, other sizes, other consolidation and retrieval."""
    from flash_vstream.ablating import ablate as run

    run(benchmark, data, model, variant or [], limit, output, as_json)


@train_app.command("prepare")
def train_prepare(
    pictures: Annotated[Path, typer.Argument(help="Folder with captions.json, splits.json and pictures or tar files.")],
    output: Annotated[Path, typer.Argument(help="Folder for captions and cached features.")],
    model: Model = "nano-base",
) -> None:
    """Encode the views of captioned pictures once, for training and evaluation."""
    from flash_vstream.train.prepare import prepare

    prepare(pictures, output, model)


@train_app.command("stage1")
def train_stage1(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Stage 1: teach projector and semantic attention (and nano's LoRA) to see, by captions."""
    _train(1, config, data, output)


@train_app.command("stage2")
def train_stage2(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Stage 2: teach the language model to answer, by questions about videos."""
    _train(2, config, data, output)


@train_app.command("grounding")
def train_grounding(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data", help="A prepared folder.")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Teach a model's grounding which words of a question name an event, and which slot shows it."""
    from flash_vstream.models.zoo import resolve
    from flash_vstream.train.grounding import GroundingConfig
    from flash_vstream.train.grounding import train_grounding as train

    settings = GroundingConfig.load(config)
    print(json.dumps(train(settings, Path(resolve(settings.model)), data, output)))


@train_app.command("captions")
def train_captions(
    data: Annotated[Path, typer.Option("--data", help="A prepared folder.")],
    model: Model = "nano",
    split: Annotated[str, typer.Option("--split")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", help="Score only this many pictures.")] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the search; 1 is greedy.")] = 1,
    as_json: Json = False,
) -> None:
    """Caption single pictures of a prepared split and score them with BLEU-4."""
    from flash_vstream.train.scoring import score_captions

    result = score_captions(data, model, split, limit, beams)
    print(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))


@train_app.command("average")
def train_average(
    before: Annotated[Path, typer.Argument(help="The result folder of a stage.")],
    after: Annotated[Path, typer.Argument(help="The result folder of a stage that went on from it.")],
    output: Annotated[Path, typer.Argument(help="Folder for the averaged adapter.")],
    share: Annotated[float, typer.Option(help="How much of AFTER is in it, from 0 to 1.")] = 0.5,
) -> None:
    """Average the adapters of two stages: keep what the later learnt, get back what it forgot."""
    from flash_vstream.train.averaging import average_adapters

    print(average_adapters(before, after, share, output))


@train_app.command("export")
def train_export(
    result: Annotated[Path, typer.Argument(help="The result folder of a stage that trained a LoRA.")],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter to ship.")],
) -> None:
    """Write a trained adapter in bfloat16 with its SHA-256, as nano ships it."""
    from flash_vstream.train.export import export_adapter

    print(json.dumps(export_adapter(result, output)))


Judge = Annotated[str, typer.Option("--judge", help="offline, similarity, or an OpenAI-compatible endpoint's URL.")]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="The model to ask at the judge's URL.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with the annotations and media.")]


def _add_benchmark(name: str) -> None:
    @eval_app.command(name, help="Run this benchmark." if name != "vstream-qa-mini" else "Run it; needs no data.")
    def run(
        data: Data = None,
        model: Model = "nano",
        reader: Annotated[
            list[str] | None, typer.Option("--reader", help="star, recent:N, uniform:N, blind, …")
        ] = None,
        protocol: Annotated[str | None, typer.Option("--protocol", help="causal, clip or whole.")] = None,
        fps: Annotated[float | None, typer.Option("--fps", help="Frames to look at in a second.")] = None,
        judge: Judge = "offline",
        judge_model: JudgeModel = None,
        shard: Annotated[str | None, typer.Option("--shard", help="i/n: this part of the videos.")] = None,
        limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many questions at most.")] = None,
        output: Annotated[Path | None, typer.Option("--output", help="Where predictions go (JSONL).")] = None,
        as_json: Json = False,
    ) -> None:
        from flash_vstream.evaluating import evaluate

        readers = reader or ["star"]
        evaluate(name, data, model, readers, protocol, fps, judge, judge_model, shard, limit, output, as_json)


for _name in BENCHMARK_NAMES:
    _add_benchmark(_name)


@eval_app.command("list")
def eval_list(as_json: Json = False) -> None:
    """Explain every benchmark: what to download, layout, size, licence, metric, published results."""
    from flash_vstream.evaluating import list_benchmarks

    list_benchmarks(as_json)


@eval_app.command("floors")
def eval_floors(
    name: Annotated[str, typer.Argument(metavar="BENCHMARK")], data: Data = None, as_json: Json = False
) -> None:
    """Score answers that look at nothing: constants, the majority, a uniform guess."""
    from flash_vstream.evaluating import tell_floors

    tell_floors(name, data, as_json)


@eval_app.command("compare")
def eval_compare(
    first: Annotated[Path, typer.Argument(metavar="A.jsonl")],
    second: Annotated[Path, typer.Argument(metavar="B.jsonl")],
    judge: Judge = "offline",
    judge_model: JudgeModel = None,
    as_json: Json = False,
) -> None:
    """Compare two runs on the same questions: paired bootstrap, and which questions flipped."""
    from flash_vstream.evaluating import compare_files

    compare_files(first, second, judge, judge_model, as_json)


@eval_app.command("skills")
def eval_skills(
    data: Annotated[Path, typer.Option("--data", help="A folder made by train prepare.")],
    model: Model = "nano",
    reader: Annotated[list[str] | None, typer.Option("--reader", help="star, recent:4, … (several allowed)")] = None,
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
    readers = reader or ["star", "recent:4", "uniform:8", "blind"]
    report = run_skills(data, model, readers, scenes, streams, questions, seed, frames)
    print(json.dumps(report)) if as_json else print_skills(report)


@eval_app.callback(invoke_without_command=True)
def _eval(
    context: typer.Context,
    explain: Annotated[bool, typer.Option("--list", help="Explain every benchmark.")] = False,
    as_json: Json = False,
) -> None:
    if explain:
        eval_list(as_json)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@vstream_qa_app.command("build")
def vstream_qa_build(
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    llm: Annotated[str, typer.Option("--llm", help="URL of an OpenAI-compatible endpoint that takes pictures.")],
    llm_model: Annotated[str, typer.Option("--llm-model", help="The model to ask there.")] = "nano",
    output: Annotated[Path, typer.Option("--output", help="Folder of the records.")] = Path("vstream-qa"),
    as_json: Json = False,
) -> None:
    """Segment, describe, summarise, ask, filter; goes on where it was stopped."""
    from flash_vstream.building import build

    build(videos, llm, llm_model, output, as_json)


@vstream_qa_app.command("review")
def vstream_qa_review(
    folder: Annotated[Path, typer.Argument(help="Folder of the records.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8001,
) -> None:
    """Serve a page on 127.0.0.1 on which to keep, edit or drop questions, with their clips."""
    from flash_vstream.building import review

    review(folder, port)


@vstream_qa_app.command("export")
def vstream_qa_export(
    folder: Annotated[Path, typer.Argument(help="Folder of the records.")],
    target: Annotated[Path, typer.Argument(help="JSON file for: eval rvs-ego --data FILE")],
) -> None:
    """Write what was not dropped in VStream-QA's packing."""
    from flash_vstream.evaluate.building import export

    print(f"{export(folder, target)} questions are in {target}")


def _train(stage: int, config_path: Path, data: Path, output: Path) -> None:
    from flash_vstream.train.config import StageConfig
    from flash_vstream.train.media import media_encoder
    from flash_vstream.train.stage import run_stage

    config = StageConfig.load(config_path)
    if config.stage != stage:
        raise UserError(f"{config_path} is of stage {config.stage}; use: flash-vstream train stage{config.stage}")
    from flash_vstream.models.zoo import resolve

    folder = Path(resolve(config.model))
    print(run_stage(config, folder, data, output, media_encoder(folder)))
