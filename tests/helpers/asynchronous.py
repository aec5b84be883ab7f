"""Running coroutines from tests."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio


def run_async(function: Callable[..., Any], *arguments: Any) -> Any:
    """``anyio.run`` in a thread of its own: Playwright keeps an event loop in the main one for the whole session."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, function, *arguments).result()
