"""How long commands take from their start: the help, the first word of an answer, a server that answers."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QUESTION = "What is happening now?"
COMMAND = [sys.executable, "-m", "flash_vstream"]
PATIENCE_SECONDS = 120.0


def help_seconds() -> float:
    """Seconds that ``flash-vstream --help`` takes."""
    started = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], capture_output=True, check=True)
    return time.perf_counter() - started


def first_word_seconds(clip: Path) -> float:
    """Seconds from the start of ``flash-vstream ask`` about a clip's end to the first word of its answer."""
    with _running(["ask", str(clip), QUESTION]) as (process, started):
        assert process.stdout is not None
        seen = b""
        # The question stands in the first line, and the answer after it.
        while not seen.partition(b"\n")[2].strip():
            if not (byte := process.stdout.read(1)):
                raise RuntimeError(f"flash-vstream ask ended without an answer, after {seen!r}")
            seen += byte
        return time.perf_counter() - started


def ready_seconds(model: str = "nano") -> float:
    """Seconds from the start of ``flash-vstream serve`` until it says that all is well."""
    with _running(["serve", "--port", "0", "--model", model]) as (process, started):
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["listening"]
        while time.perf_counter() - started < PATIENCE_SECONDS:
            with urllib.request.urlopen(f"{url}healthz", timeout=PATIENCE_SECONDS) as response:
                if json.load(response)["status"] == "ok":
                    return time.perf_counter() - started
            time.sleep(0.01)
    raise RuntimeError(f"flash-vstream serve was not ready within {PATIENCE_SECONDS:.0f} s")


@contextmanager
def _running(arguments: list[str]) -> Iterator[tuple["subprocess.Popen[bytes]", float]]:
    """A command with its output in a pipe, and when it was started; it is ended with the block."""
    started = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    try:
        yield process, started
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
