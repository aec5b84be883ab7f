"""Repositories on the Hugging Face hub, each at one commit that stays the same.

What a branch of a repository holds can change under its name, and weights that change unnoticed give
other answers. So the commit of a first fetch is recorded in the cache (``models/revisions.json``) and
every later fetch of that repository asks for the same one. ``NAME@REVISION`` names another.
"""

import json
import re
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from flash_vstream.errors import UserError
from flash_vstream.files import write_text_atomically
from flash_vstream.wheels import cache_dir, cache_errors

CONFIG_FILES = ["config.json"]
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "tokenizer*"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None]:
    """``"org/model@v1"`` as ``("org/model", "v1")``; the revision is None where none is named."""
    hub_id, at, revision = name.partition("@")
    if at and not revision:
        raise UserError(f"{name} names no revision; write {hub_id}@REVISION (a commit, tag or branch) or {hub_id}")
    return hub_id, revision or None


def fetch_snapshot(name: str, patterns: list[str]) -> Path:
    """The folder with those files of ``org/model`` or ``org/model@revision`` that match ``patterns``.

    Without a revision it is the recorded commit's, or, the first time, that of the default branch,
    which is then recorded. Raises ``UserError`` when the hub does not give the files.
    """
    hub_id, revision = split_revision(name)
    pinned = revision or recorded_revision(hub_id)
    try:
        folder = Path(snapshot_download(hub_id, revision=pinned, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        at = f" at {pinned}" if pinned else ""
        raise UserError(
            f"could not fetch {hub_id}{at} from the Hugging Face hub: {str(error).splitlines()[0]}\n"
            "Check the name and the network, or give the path of a folder that holds the checkpoint."
        ) from None
    commit = commit_of(folder)
    if pinned is None and commit is not None:
        _record(hub_id, commit)
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of a fetched folder, which the hub's cache names after it; None for any other folder."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def recorded_revision(hub_id: str) -> str | None:
    """The commit at which a repository was first fetched, None before that."""
    revision = _records().get(hub_id)
    return str(revision) if revision is not None else None


def _records_file() -> Path:
    return cache_dir() / "models" / "revisions.json"


def _records() -> dict[str, Any]:
    path = _records_file()
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError):
        records = None
    if not isinstance(records, dict):
        raise UserError(f"{path} cannot be read; delete it to fetch each model's newest revision once more")
    return records


def _record(hub_id: str, commit: str) -> None:
    path = _records_file()
    with cache_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            write_text_atomically(path, json.dumps(_records() | {hub_id: commit}, indent=1) + "\n")
