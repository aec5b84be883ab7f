"""What a test needs from the machine."""

import os

import pytest


def missing(what: str) -> None:
    """Skip a test because something from .ci/packages is missing; on CI, fail instead."""
    (pytest.fail if os.environ.get("FLASH_VSTREAM_TEST_ALL") else pytest.skip)(f"{what} is not here; see .ci/packages")
