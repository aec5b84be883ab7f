"""The house's rooms: imports go one way (docs/design.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flash_vstream"
# Which rooms a room may import from; modules directly under the package are the front of the house.
ALLOWED = {
    "memory": set(),
    "video": set(),
    "models": {"memory"},
    "stream": {"memory", "models", "video"},
    "serve": {"memory", "models", "stream", "video"},
    "train": {"memory", "models", "stream", "video"},
    "evaluate": {"memory", "models", "stream", "train", "video"},
}
SHARED = {"errors", "forking", "timecode", "__version__"}
FRONT = {
    "ablating",
    "asking",
    "bench",
    "bench_live",
    "building",
    "cli",
    "demo",
    "evaluating",
    "serving",
    "watching",
}


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
    for path in (SOURCE / room).rglob("*.py"):
        foreign = imported_rooms(path) - {room} - SHARED - ALLOWED[room]
        assert not foreign, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(foreign))}"


def test_every_room_is_known():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ALLOWED)
    assert {path.stem for path in SOURCE.glob("*.py")} == FRONT | SHARED - {"__version__"} | {"__init__", "__main__"}


def test_memory_knows_tensors_only():
    for path in (SOURCE / "memory").glob("*.py"):
        modules = {
            n.module.split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        }
        assert modules <= {"flash_vstream", "torch", "dataclasses", "collections", "typing"}, path


def test_import_is_quick():
    code = "import sys, flash_vstream; assert 'torch' not in sys.modules; assert 'FlashVStream' in dir(flash_vstream)"
    subprocess.run([sys.executable, "-c", code], check=True)
