"""``serve --engine ray`` as a command, on a Ray that it starts for itself.

Ray is not part of the suite's environment: install flash-vstream[ray], then `pytest -m slow tests/test_ray_serve.py`.
"""

import re
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_watches_answers_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch, number):
    pytest.importorskip("ray")
    state, shared, temporary = tmp_path / "state", tmp_path / "shared", Path(tempfile.mkdtemp(prefix="t"))
    shared.mkdir()
    monkeypatch.setenv("RAY_ADDRESS", "local")  # a Ray of its own, whatever else runs here
    monkeypatch.setenv("FLASH_VSTREAM_SHARED_FOLDER", str(shared))
    monkeypatch.setenv("TMPDIR", str(temporary))
    video = write_video(tmp_path / "clip.mp4", frames=20)
    options = ("--engine", "ray", "--state", str(state), "--allow-folder", str(tmp_path), "--worker-cpus", "0.25")
    options += ("--spare-workers", "0")  # one that is still starting would be killed, and leave its folder for later
    with serving(str(tiny_folder), *options) as server:
        server.wait_for("/healthz", lambda status, body: status == 200, 300.0)
        status, body = server.call("POST", "/v1/streams", {"name": "door", "source": str(video), "fps": 5.0})
        assert status == 201, body
        server.wait_for("/v1/streams/door", lambda _, body: body["time"] is not None, 300.0)
        body = {"question": "what is there?", "max_new_tokens": 3}
        status, answer = server.call("POST", "/v1/streams/door/questions", body)
        assert (status, answer["stream_time"] is not None) == (200, True), answer
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in children)
        server.process.send_signal(number)
        server.process.wait(timeout=300)
        until(lambda: not any(child.is_running() for child in children))
    assert (state / "memories" / "door.safetensors").exists()
    assert list(shared.iterdir()) == []
    assert [path.name for path in temporary.iterdir() if re.match(r"flash-vstream|\.fvs", path.name)] == []
    shutil.rmtree(temporary)
