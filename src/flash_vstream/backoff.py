"""The delay before something that failed is tried again."""

import random


def backoff_seconds(failures: int, shortest: float, longest: float) -> float:
    """The delay after so many failures in a row: doubled each time up to ``longest``, and up to 30% shorter.

    The jitter keeps what failed together from being tried again together.
    """
    return min(longest, shortest * 2.0 ** min(max(0, failures - 1), 10)) * random.uniform(0.7, 1.0)
