"""Importing late, and importing much at once."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``, which imports each public name on first use; ``homes`` are their modules."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load


@contextmanager
def no_garbage() -> Iterator[None]:
    """Context for imports, which leave no garbage: without it, a fifth of their time goes into looking for some.

    What exists at its end is never looked through again, which also keeps it shared among forked processes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
