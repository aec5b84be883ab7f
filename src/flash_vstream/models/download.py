"""Fetches repositories from the Hugging Face hub, each pinned to one commit.

A branch can change, and weights that change unnoticed give different answers. So the first fetch of a
repository records its commit in the cache (``models/revisions.json``), and later fetches use the same
commit. ``NAME@REVISION`` selects another.
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
    """Split ``"org/model@v1"`` into ``("org/model", "v1")``; the revision is None if not given."""
    hub_id, at, revision = name.partition("@")
    if at and not revision:
        raise UserError(f"{name} names no revision; write {hub_id}@REVISION (a commit, tag or branch) or {hub_id}")
    return hub_id, revision or None


def fetch_snapshot(name: str, patterns: list[str]) -> Path:
    """Fetch the files of ``org/model`` or ``org/model@revision`` that match ``patterns``; returns their folder.

    Without a revision, uses the recorded commit; on the first fetch, uses the default branch and
    records its commit. Raises ``UserError`` if the files cannot be fetched.
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
    """The commit of a folder in the hub's cache, which is named after it; None for any other folder."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def recorded_revision(hub_id: str) -> str | None:
    """The commit at which a repository was first fetched; None if it was never fetched."""
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
