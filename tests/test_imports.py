"""Imports go one way (docs/design.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from flash_vstream.live.fork_server import PRELOADED, WITH_TRANSFORMERS

SOURCE = Path(__file__).parent.parent / "src" / "flash_vstream"
# The packages and modules that each may import from, besides itself and the shared leaves.
SHARED = {"backoff", "descriptors", "errors", "files", "imports", "json_log", "timecode", "wheels", "__version__"}
ALLOWED: dict[str, set[str]] = {
    "backoff": set(),
    "descriptors": set(),
    "errors": set(),
    "files": set(),
    "imports": set(),
    "json_log": set(),
    "timecode": set(),
    "wheels": set(),
    "sample_clips": set(),
    "memory": set(),
    "video": set(),
    "models": {"memory"},
    "pipeline": {"memory", "models", "video"},
    "synthetic": {"memory", "models", "video"},
    "live": {"memory", "models", "pipeline", "video"},
    "serve": {"memory", "models", "pipeline", "live", "video"},
    "train": {"memory", "models", "pipeline", "synthetic", "video"},
    "evaluate": {"memory", "models", "pipeline", "synthetic", "video", "sample_clips"},
    "bench": {"memory", "models", "pipeline", "synthetic", "live", "serve", "evaluate", "video", "sample_clips"},
}
ALLOWED["cli"] = {*ALLOWED, "cli"}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "flash_vstream" else [f"flash_vstream.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("flash_vstream.")}
    return rooms


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    paths = [*(SOURCE / room).rglob("*.py")] or [SOURCE / f"{room}.py"]
    for path in paths:
        foreign = imported_rooms(path) - {room} - SHARED - ALLOWED[room]
        assert not foreign, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(foreign))}"


def test_every_room_is_known():
    rooms = {path.stem for path in SOURCE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert rooms == set(ALLOWED) | {"__init__", "__main__"}


def test_the_fork_server_preloads_nothing_from_above():
    preloaded = {name.split(".")[1] for name in (*PRELOADED, WITH_TRANSFORMERS)}
    assert preloaded <= ALLOWED["live"] | {"live"}


def test_memory_knows_tensors_only():
    for path in (SOURCE / "memory").glob("*.py"):
        modules = {
            n.module.split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        }
        assert modules <= {"flash_vstream", "torch", "dataclasses", "collections", "typing"}, path


def test_import_is_quick():
    code = "import sys, flash_vstream; assert 'torch' not in sys.modules; assert 'FlashVStream' in dir(flash_vstream)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_only_watches_and_answers_imports_no_transformers():
    code = "import sys, flash_vstream.live.preload; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_imports_no_torch():
    """Only its workers need it: it takes half a second, and 200 MB."""
    code = "import sys, flash_vstream.cli.serve, flash_vstream.serve.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_garbage_is_looked_for_again_after_imports():
    code = "import gc, flash_vstream.live.preload; assert gc.isenabled() and gc.get_freeze_count() > 10_000"
    subprocess.run([sys.executable, "-c", code], check=True)
