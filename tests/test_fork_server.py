"""The fork server's sockets: one at a time, and none left behind."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from multiprocessing import forkserver
import psutil
from flash_vstream.live import fork_server
from flash_vstream.models.choice import ModelChoice

fork_server.PRELOADED.clear()  # quick
fork_server.WITH_TRANSFORMERS = "json"
for _ in range(2):
    fork_server.ensure_fork_server(ModelChoice('nano'))
    print(*sorted(path.name for path in fork_server._sockets.iterdir()), flush=True)
    running = psutil.Process(forkserver._forkserver._forkserver_pid)
    running.kill()
    while running.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
sys.stdin.read()
"""


@pytest.fixture
def folder():
    """A folder for temporary files with a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="fs") as path:
        yield Path(path)


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".fvs", "pymp"))]


def test_a_fork_server_that_died_leaves_no_socket_and_its_parent_no_folder(folder):
    with start(folder) as process:
        sockets = [process.stdout.readline().split() for _ in range(2)]
        assert [len(names) for names in sockets] == [1, 1]
        assert sockets[0] != sockets[1]
        assert len(left(folder)) == 1
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert left(folder) == []


ENDING = """
import os
from flash_vstream.live import fork_server
from flash_vstream.models.choice import ModelChoice

fork_server.PRELOADED.clear()  # quick
fork_server.ensure_fork_server(ModelChoice('nano'))
fork_server.end_fork_server()
os._exit(0)
"""


def test_a_process_that_is_about_to_be_killed_can_end_it(folder):
    environment = os.environ | {"TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", ENDING], env=environment, check=True, timeout=60)
    assert left(folder) == []


def test_what_a_killed_process_left_goes_at_the_next_start(folder):
    with start(folder) as killed:
        killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
    (abandoned,) = left(folder)
    with start(folder) as process:
        process.stdout.readline()
        assert abandoned not in left(folder)
        process.stdin.close()
        process.wait(timeout=60)
