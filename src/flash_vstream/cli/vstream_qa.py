"""``vstream-qa``: build and review a benchmark from your own videos."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flash_vstream.cli.options import Json
from flash_vstream.cli.serve import listen
from flash_vstream.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

app = typer.Typer(help="Make a benchmark like VStream-QA from your own videos.", no_args_is_help=True)


@app.command()
def build(
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    llm: Annotated[str, typer.Option("--llm", help="URL of an OpenAI-compatible endpoint that accepts pictures.")],
    llm_model: Annotated[str, typer.Option("--llm-model", help="The model to ask there.")] = "nano",
    output: Annotated[Path, typer.Option("--output", help="Folder of the records.")] = Path("vstream-qa"),
    as_json: Json = False,
) -> None:
    """Segment and describe videos, then write and filter questions; resumes where it stopped."""
    run_build(videos, llm, llm_model, output, as_json)


@app.command()
def review(
    folder: Annotated[Path, typer.Argument(help="Folder of the records.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8001,
) -> None:
    """Serve a page on 127.0.0.1 for keeping, editing or dropping questions next to their clips."""
    import uvicorn

    app = guarded_review_app(folder)
    listener = listen("127.0.0.1", port)
    print(json.dumps({"listening": f"http://127.0.0.1:{listener.getsockname()[1]}/"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def guarded_review_app(folder: Path) -> "FastAPI":
    """The review page behind the server's loopback rules: only its own host and its own pages may call it."""
    from flash_vstream.evaluate.review import review_app
    from flash_vstream.serve.middleware import BodyLimit, CallerCheck
    from flash_vstream.serve.security import AccessRules

    app = review_app(folder)
    app.add_middleware(BodyLimit, json_bytes=2**16, upload_bytes=2**16)
    app.add_middleware(CallerCheck, access=AccessRules())
    return app


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of the records.")],
    target: Annotated[Path, typer.Argument(help="JSON file for: eval rvs-ego --data FILE")],
) -> None:
    """Write the questions that were not dropped, in VStream-QA's format."""
    from flash_vstream.evaluate.generation import export as export_records

    print(f"{export_records(folder, target)} questions are in {target}")


def run_build(videos: Sequence[Path], url: str, model: str, output: Path, as_json: bool) -> None:
    """Build every video's record in ``output`` and report the cost."""
    from flash_vstream.evaluate.endpoint import ChatEndpoint
    from flash_vstream.evaluate.generation import Building
    from flash_vstream.video import probe

    if not url.startswith(("http://", "https://")):
        raise UserError(f"--llm {url!r} must be the URL of an OpenAI-compatible endpoint")
    doubled = [name for name, count in Counter(video.stem for video in videos).items() if count > 1]
    if doubled:
        raise UserError(f"two videos are called {doubled[0]}; their records would be one file")
    for video in videos:
        probe(video)
    output.mkdir(parents=True, exist_ok=True)
    endpoint = ChatEndpoint(url, model, os.environ.get("OPENAI_API_KEY"))
    reports: list[dict[str, Any]] = []
    for video in videos:
        building = Building(video, output, endpoint)
        with Console(stderr=True).status(video.name) as status:
            building.run(lambda text, name=video.name: status.update(f"{name}: {text}"))  # type: ignore[misc]
        record = building.record
        states = Counter(question["status"] for question in record["questions"])
        why = Counter(question["why"] for question in record["questions"] if question["why"])
        row: dict[str, Any] = {
            "video": str(video),
            "segments": len(record["segments"]),
            "questions": dict(states),
            "dropped": dict(why),
        }
        reports.append(row | {"unreadable_replies": record["unreadable"], "cost": record["cost"]})
    if as_json:
        print(json.dumps(reports))
        return
    for row in reports:
        cost, counts = row["cost"], ", ".join(f"{count} {state}" for state, count in row["questions"].items())
        print(
            f"{row['video']}: {row['segments']} segments, questions: {counts or 'none'},"
            f" {row['unreadable_replies']} unreadable replies; {cost['calls']} calls,"
            f" {cost['prompt_tokens']:,} + {cost['completion_tokens']:,} tokens"
        )
