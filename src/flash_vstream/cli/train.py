"""``train``: prepare data, run the training stages, and export the result."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flash_vstream.cli.options import Model
from flash_vstream.errors import UserError

AnnotatedPictures = Annotated[
    list[Path], typer.Option("--data", help="A prepared folder of annotated pictures (several allowed).")
]

app = typer.Typer(help="Train a model: prepare data, stage 1, stage 2.", no_args_is_help=True)


@app.command("prepare")
def train_prepare(
    pictures: Annotated[Path, typer.Argument(help="Folder with captions.json, splits.json and pictures or tar files.")],
    output: Annotated[Path, typer.Argument(help="Folder for captions and cached features.")],
    model: Model = "nano-base",
) -> None:
    """Encode the views of captioned pictures once and cache the features, for training and evaluation."""
    from flash_vstream.train.prepare import prepare

    prepare(pictures, output, model)


@app.command("join")
def train_join(
    language_model: Annotated[str, typer.Argument(help="A causal language model: a folder or a hub id.")],
    vision_tower: Annotated[str, typer.Argument(help="A vision tower, such as CLIP: a folder or a hub id.")],
    output: Annotated[Path, typer.Argument(help="The new model's folder.")],
    template: Annotated[str, typer.Option(help="Its prompt template: vicuna_v1, llama_2, chatml, v0.")] = "vicuna_v1",
    seed: Annotated[int, typer.Option(help="Seed of the untrained parts.")] = 0,
) -> None:
    """Join a language model and a vision tower into a fresh model, the starting point of stage 1."""
    from flash_vstream.models.joining import join

    print(join(language_model, vision_tower, output, template, seed))


@app.command("stage1")
def train_stage1(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Stage 1: train the projector and semantic attention (and nano's LoRA) on captions."""
    _train(1, config, data, output)


@app.command("stage2")
def train_stage2(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Stage 2: train the language model on questions about videos."""
    _train(2, config, data, output)


@app.command("grounding")
def train_grounding(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data", help="A prepared folder.")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Train a model's grounding to mark the words that name an event and find the slot that shows it."""
    from flash_vstream.models.hub import fetch_model
    from flash_vstream.train.grounding import GroundingConfig
    from flash_vstream.train.grounding import train_grounding as train

    settings = GroundingConfig.load(config)
    print(json.dumps(train(settings, fetch_model(settings.model), data, output)))


@app.command("sight")
def train_sight(
    config: Annotated[Path, typer.Argument()],
    data: AnnotatedPictures,
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Teach a model's sight which things a frame shows, and how many people."""
    from flash_vstream.train.sight import SightConfig
    from flash_vstream.train.sight import train_sight as train

    print(json.dumps(train(SightConfig.load(config), data, output)))


@app.command("short-answers")
def train_short_answers(
    config: Annotated[Path, typer.Argument()],
    data: AnnotatedPictures,
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Teach a model's short answers what a few words can answer about a frame."""
    from flash_vstream.models.hub import fetch_model
    from flash_vstream.train.short_answers import ShortAnswersConfig
    from flash_vstream.train.short_answers import train_short_answers as train

    settings = ShortAnswersConfig.load(config)
    print(json.dumps(train(settings, fetch_model(settings.model), data, output)))


@app.command("tower")
def train_tower(
    config: Annotated[Path, typer.Argument()],
    data: Annotated[Path, typer.Option("--data", help="A folder of annotated pictures, as for train prepare.")],
    output: Annotated[Path, typer.Option("--output")],
) -> None:
    """Train a model's vision tower together with its grounding, sight and short answers."""
    from flash_vstream.models.hub import fetch_model
    from flash_vstream.train.tower import TowerConfig
    from flash_vstream.train.tower import train_tower as train

    settings = TowerConfig.load(config)
    print(json.dumps(train(settings, fetch_model(settings.model), data, output)))


@app.command("average")
def train_average(
    before: Annotated[Path, typer.Argument(help="The result folder of a stage.")],
    after: Annotated[Path, typer.Argument(help="The result folder of a later stage trained from it.")],
    output: Annotated[Path, typer.Argument(help="Folder for the averaged adapter.")],
    share: Annotated[float, typer.Option(help="The weight of AFTER, from 0 to 1.")] = 0.5,
) -> None:
    """Average the adapters of two stages, to keep what the later one learned and recover what it forgot."""
    from flash_vstream.train.averaging import average_adapters

    print(average_adapters(before, after, share, output))


@app.command("export")
def train_export(
    result: Annotated[Path, typer.Argument(help="The result folder of a stage that trained a LoRA.")],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter to ship.")],
) -> None:
    """Write a trained adapter in bfloat16 with its SHA-256, in the form shipped with nano."""
    from flash_vstream.train.export import export_adapter

    print(json.dumps(export_adapter(result, output)))


def _train(stage: int, config_path: Path, data: Path, output: Path) -> None:
    from flash_vstream.train.config import StageConfig
    from flash_vstream.train.media import media_encoder
    from flash_vstream.train.stage import run_stage

    config = StageConfig.load(config_path)
    if config.stage != stage:
        raise UserError(f"{config_path} is of stage {config.stage}; use: flash-vstream train stage{config.stage}")
    from flash_vstream.models.hub import fetch_model

    folder = fetch_model(config.model)
    print(run_stage(config, folder, data, output, media_encoder(folder)))
