"""Wait for another process."""

import time


def until(condition, seconds: float = 120.0):
    """Wait for a condition and return its value; the limit is generous because machines may be busy."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")
