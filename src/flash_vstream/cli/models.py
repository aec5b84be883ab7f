"""``models`` and ``pull``: list the models, and fetch one ahead of time."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flash_vstream.cli.options import Json
from flash_vstream.models.catalog import MODELS, VLM_FAMILIES, model_folder


def models(as_json: Json = False) -> None:
    """List the models and families of models: what they are, whether they are here, sizes, licences, tests."""
    folders = {name: model_folder(name) for name in MODELS}
    if as_json:
        rows = [
            {**vars(m), "present": folders[m.name].exists(), "folder": str(folders[m.name])} for m in MODELS.values()
        ]
        rows += [{**vars(family), "family": True} for family in VLM_FAMILIES]
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "what it is", "here", "size", "licence", "from")
    for model in MODELS.values():
        here = "yes" if folders[model.name].exists() else "no"
        table.add_row(model.name, model.summary, here, f"{model.megabytes:,} MB", model.licence, model.source)
    Console().print(table)
    families = Table("any model of", "such as", "tested with", title="Transformers' vision-language models")
    for family in VLM_FAMILIES:
        families.add_row(family.name, family.example, family.tested)
    Console().print(families)


def pull(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    language_to: Annotated[
        Path | None, typer.Option(help="Also write the language model alone to this new folder, for vLLM.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch and assemble a model ahead of time."""
    from flash_vstream.models.hub import load
    from flash_vstream.models.hub import pull as pull_model

    with Console(stderr=True).status(f"looking for {name}") as status:
        folder = pull_model(name, status.update)
        if language_to is not None:
            from flash_vstream.files import atomic_folder
            from flash_vstream.models.engines.vllm import export_language

            status.update(f"writing {language_to}")
            with atomic_folder(language_to) as scratch:
                export_language(*load(name), scratch)
    print(json.dumps({"name": name, "folder": str(folder)}) if as_json else f"{name} is at {folder}")
