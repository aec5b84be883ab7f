"""Training samples in LLaVA's JSON format: checked before the first step, and read one at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from flash_vstream.errors import UserError
from flash_vstream.synthetic.questions import Turn
from flash_vstream.train.datasets import Sample


class LlavaSamples(Dataset[Sample]):
    """LLaVA-format JSON: a list of ``{"conversations": [{"from", "value"}, …], …}``.

    A sample's stream comes from ``"features": "file.safetensors:key"`` (``[T, P², D]``, with times
    from ``file.safetensors:key.times`` if present, otherwise one frame per second), from ``"image"``
    or from ``"video"``. Images and videos go through ``encode``, which maps a path to features and
    times; where there is no such file, its features may be stored beside it under the same name with
    ``.safetensors``. An entry with none of these is plain chat. Paths are relative to ``folder``, or to its
    subfolders ``images`` and ``videos``. A sample whose medium cannot be read has a ``problem``.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        encode: Callable[[Path], tuple[Tensor, Tensor]],
        independent: bool = False,
        images: str = ".",
        videos: str = ".",
    ):
        self.folders = {"features": folder, "image": folder / images, "video": folder / videos}
        self.entries = checked_entries(path, self.folders)
        self.encode = encode
        self.independent = independent

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        name = str(entry.get("id", index))
        turns = turns_of(entry, name)
        try:
            features, times = self._stream(entry)
        except UserError as error:
            return Sample(None, torch.zeros(0, dtype=torch.float64), (), problem=f"sample {name}: {error}")
        return Sample(features, times, turns, self.independent)

    def _stream(self, entry: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        if "features" in entry:
            return _stored(_file(entry, "features", self.folders), entry["features"].partition(":")[2])
        for kind in ("image", "video"):
            if kind in entry:
                return self.encode(_file(entry, kind, self.folders))
        return None, torch.zeros(0, dtype=torch.float64)


def _file(entry: dict[str, Any], kind: str, folders: Mapping[str, Path]) -> Path:
    """The file of an entry's medium or, if only that is there, of the features stored for it."""
    name = str(entry[kind])
    path = folders[kind] / (name.partition(":")[0] if kind == "features" else name)
    stored = path.with_suffix(".safetensors")
    return stored if stored.exists() and not path.exists() else path


def _stored(path: Path, key: str) -> tuple[Tensor, Tensor]:
    """Features and times stored under ``key``. Raises ``UserError`` when they are not there."""
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor(key)
            has_times = f"{key}.times" in file.keys()  # noqa: SIM118 - not a dict
            times = file.get_tensor(f"{key}.times") if has_times else torch.arange(len(features))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} holds no features called {key!r} ({error})") from None
    if features.ndim != 3 or len(times) != len(features) or not len(features):
        raise UserError(f"{path}: {key} is {list(features.shape)} with {len(times)} times; features are [T, P², D]")
    return features.float(), times.double()


SHOWN_PROBLEMS = 10


def checked_entries(path: Path, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Load and validate the entries of a LLaVA-format file.

    Raises a single ``UserError`` that counts and lists all problems: malformed entries, turns without
    a question and an answer, missing or empty media. Media are not decoded here.
    """
    try:
        entries = json.loads(path.read_bytes())  # in any of JSON's encodings
    except FileNotFoundError:
        raise UserError(f"no training data at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file of training data ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a list of entries with conversations, not empty")
    problems = [problem for i, entry in enumerate(entries) if (problem := _problem(entry, i, folders))]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(f"{len(problems)} of {len(entries)} entries of {path} cannot be trained on:\n{shown}{more}")
    return entries


def _problem(entry: Any, index: int, folders: Mapping[str, Path]) -> str | None:
    """The reason why an entry cannot be used for training, or None."""
    if not isinstance(entry, dict):
        return f"entry {index} is no object"
    name = f"entry {entry.get('id', index)}"
    parts = entry.get("conversations")
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("from"), str) and isinstance(part.get("value"), str)
        for part in parts
    ):
        return f"{name} needs conversations: a list of objects with from and value"
    try:
        turns_of(entry, str(entry.get("id", index)))
    except UserError as error:
        return str(error)
    for kind in ("features", "image", "video"):
        medium = entry.get(kind)
        if kind in entry and not (isinstance(medium, str) and medium):
            return f"{name}: {kind} must be one path"
        if kind in entry and (problem := _problem_of_file(kind, entry, folders)):
            return f"{name}: {problem}"
    return None


def _problem_of_file(kind: str, entry: dict[str, Any], folders: Mapping[str, Path]) -> str | None:
    """The reason why an entry's medium cannot be read, as far as that shows without decoding it, or None."""
    try:
        file = _file(entry, kind, folders)
        if not file.exists():
            return f"no file {file}"
        if file.is_dir() and kind != "video":  # a video may be a folder of pictures
            return f"{file} is a folder"
        if file.is_file() and file.stat().st_size == 0:
            return f"{file} is empty"
    except OSError as error:
        return f"cannot read {entry[kind][:100]}: {error.strerror}"
    return None


USER_ROLES = frozenset({"human", "user"})
ANSWER_ROLES = frozenset({"gpt", "assistant", "model"})


def turns_of(entry: dict[str, Any], name: str) -> tuple[Turn, ...]:
    """The turns of a LLaVA conversation; consecutive parts with the same role are joined.

    Assistant text before the first question, ``system`` parts and a final unanswered question are
    left out. Raises ``UserError`` naming the sample when a role is unknown or no question has an
    answer.
    """
    turns: list[tuple[str, str]] = []
    last = None
    for part in entry["conversations"]:
        role, text = part["from"], part["value"].replace("<image>", "").replace("<video>", "").strip()
        if role in USER_ROLES:
            turns = [*turns[:-1], (f"{turns[-1][0]}\n{text}", "")] if last == "question" else [*turns, (text, "")]
            last = "question"
        elif role in ANSWER_ROLES:
            if turns:
                question, answer = turns[-1]
                turns[-1] = (question, f"{answer}\n{text}".strip())
                last = "answer"
        elif role != "system":
            raise UserError(f"sample {name} has a turn of {role!r}; roles are human and gpt, or user and assistant")
    answered = tuple(Turn(question, (answer,)) for question, answer in turns if answer)
    if not answered:
        raise UserError(f"sample {name} has no question with an answer")
    return answered
