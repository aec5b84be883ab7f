"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", help="A model's name, a model folder or a hub id: ORG/MODEL or ORG/MODEL@REVISION.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Fps = Annotated[float, typer.Option("--fps", help="Frames per second of stream time to look at.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with the annotations and media.")]
