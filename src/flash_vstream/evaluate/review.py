"""A local web page to keep, edit or drop the questions that ``vstream-qa build`` made."""

import threading
from importlib.resources import files
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from flash_vstream.evaluate.generation import KINDS, read_record, records_in, write_record


class Verdict(BaseModel):
    """A reviewer's decision on a question."""

    status: Literal["kept", "dropped", "new"]
    question: str = Field(min_length=1, max_length=1000, pattern=r"\S")
    answer: str = Field(min_length=1, max_length=1000, pattern=r"\S")


def review_app(folder: Path) -> FastAPI:
    """The review page and its API; every verdict is saved to the record immediately.

    Raises ``UserError`` when the folder holds no records.
    """
    names = [path.stem for path in records_in(folder)]
    lock = threading.Lock()
    app = FastAPI(title="VStream-QA review", openapi_url=None)

    def path_of(name: str) -> Path:
        if name not in names:
            raise HTTPException(404, f"no record is called {name!r}")
        return folder / f"{name}.json"

    @app.get("/")
    def page() -> Response:
        return Response((files("flash_vstream.evaluate") / "review.html").read_bytes(), media_type="text/html")

    @app.get("/records")
    def records() -> list[dict[str, object]]:
        """All records, without their pictures."""
        listed: list[dict[str, object]] = []
        for name in names:
            record = read_record(path_of(name))
            listed.append({"name": name, "questions": record["questions"], "kinds": KINDS, "cost": record["cost"]})
        return listed

    @app.post("/records/{name}/{number}")
    def judge(name: str, number: int, verdict: Verdict) -> dict[str, object]:
        path = path_of(name)
        with lock:
            record = read_record(path)
            if not 0 <= number < len(record["questions"]):
                raise HTTPException(404, f"{name} has no question {number}")
            question: dict[str, object] = record["questions"][number]
            question |= verdict.model_dump() | {"why": "dropped by hand" if verdict.status == "dropped" else None}
            write_record(path, record)
        return question

    @app.get("/clips/{name}")
    def clip(name: str) -> FileResponse:
        video = Path(read_record(path_of(name))["video"])
        if not video.is_file():
            raise HTTPException(404, f"the video of {name} is not at {video} any more")
        return FileResponse(video)

    return app
