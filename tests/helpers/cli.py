"""Run the command line inside the test process."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from flash_vstream.cli.main import main


def run(*arguments: str | Path, cache: Path | None = None) -> subprocess.CompletedProcess:
    """Run the command line in this process; return exit code, stdout and stderr like a separate process."""
    environment = {"COLUMNS": "200"} | ({"FLASH_VSTREAM_CACHE": str(cache)} if cache else {})
    command = ["flash-vstream", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
