"""A real RTSP server (``rtsp_server.py``) in a separate process."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.environment import missing

SYSTEM_PYTHON = "/usr/bin/python3"  # GStreamer's bindings are only in the system Python


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def rtsp_serving(port: int, *arguments: str) -> Iterator[str]:
    """Serve a test picture until the block ends and yield its URL; ``arguments`` go to ``rtsp_server.py``."""
    probe = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if subprocess.run(["/usr/bin/env", "-i", SYSTEM_PYTHON, "-c", probe], capture_output=True, check=False).returncode:
        missing("GStreamer's RTSP server")
    script = Path(__file__).parent / "rtsp_server.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.Popen(
        [SYSTEM_PYTHON, str(script), str(port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n", process.stderr.read() if process.stderr else ""
        yield f"rtsp://user:hidden@127.0.0.1:{port}/camera"
    finally:
        process.kill()
        process.communicate()
