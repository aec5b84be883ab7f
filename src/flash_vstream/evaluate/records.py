"""Files of one JSON object a line that a run appends to, and that a later run goes on from."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from flash_vstream.errors import UserError

PREDICTION = frozenset({"id", "video", "question", "answer", "choices", "prediction", "error", "run"})
JUDGEMENT = frozenset({"id", "judge", "prediction", "correct", "score"})


def read_predictions(path: Path, remedy: str = "name a file that eval has written") -> list[dict[str, Any]]:
    """The predictions in ``path``. Raises ``UserError``, which tells the ``remedy``, when it is no file of them."""
    rows = read_records(path, PREDICTION, "predictions", remedy)
    if any(not isinstance(row["run"], dict) or "benchmark" not in row["run"] for row in rows):
        raise UserError(f"{path} is not a file of predictions; {remedy}")
    return rows


def read_records(path: Path, fields: Set[str], what: str, remedy: str) -> list[dict[str, Any]]:
    """The objects in ``path``, each of which has all ``fields``, without a last line cut short by a kill.

    Raises ``UserError`` when the file is no file of ``what``.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a file of {what}; {remedy}") from None
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) - 1 and not text.endswith("\n") and line.startswith('{"id": '):
                continue
            row = None
        if not isinstance(row, dict) or not fields <= row.keys():
            raise UserError(f"{path} is not a file of {what} (line {number + 1}); {remedy}")
        rows.append(row)
    return rows
