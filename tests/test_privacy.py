"""Nothing is sent that nobody asked for: what Python's audit hook sees of a process that loads a model and answers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "flash_vstream"
CI_VARIABLES = ("CI", "TF_BUILD", "JENKINS_URL")
"""Where one of these is set, OpenVINO sends nothing anyway."""
PROGRAM = """
import atexit, json, sys

seen = []
# The first to be registered runs last, when every thread has ended.
atexit.register(lambda: print(json.dumps(seen)))

def note(event, arguments):
    if event.startswith(("socket.", "urllib.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec")):
        seen.append(f"{event} {arguments}")

sys.addaudithook(note)

import numpy as np
from flash_vstream import FlashVStream
from flash_vstream.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from flash_vstream.models.engines.openvino_tower import OpenVinoTower

pipeline = FlashVStream.from_pretrained(sys.argv[1], "cpu")
assert pipeline.generator.engine.name == "openvino"
OpenVinoTower(EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64)))
stream = pipeline.new_stream()
stream.write(np.zeros((1, 32, 32, 3), np.uint8), [0.0])
assert pipeline.ask(stream, "what?", max_new_tokens=2).finish().stream_time == 0
"""


def test_loading_and_answering_open_no_connection_and_start_no_process(tiny_folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in CI_VARIABLES}
    environment |= {"HOME": str(tmp_path / "home"), "FLASH_VSTREAM_CACHE": str(tmp_path / "cache")}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert not (tmp_path / "home" / "intel").exists()  # where OpenVINO keeps the id that it reports under


def imports_openvino(path: Path) -> bool:
    """Whether a file imports OpenVINO itself, by a statement or by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [getattr(argument, "value", None) for argument in node.args]
        if any(str(name).split(".")[0] == "openvino" for name in names):
            return True
    return False


def test_openvino_is_imported_in_one_place():
    """Which is where its telemetry is left out."""
    others = set(SOURCE.rglob("*.py")) - {SOURCE / "models" / "engines" / "openvino_library.py"}
    assert [path for path in others if imports_openvino(path)] == []
