"""What a test needs of the machine."""

import os

import pytest


def missing(what: str) -> None:
    """Skip a test for want of something that .ci/packages installs; on CI that is a failure."""
    (pytest.fail if os.environ.get("FLASH_VSTREAM_TEST_ALL") else pytest.skip)(f"{what} is not here; see .ci/packages")
