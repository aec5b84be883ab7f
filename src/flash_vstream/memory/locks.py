"""A private lock for objects that can be copied and pickled."""

import threading
from typing import Any


class Locked:
    """Gives an object ``self._lock``; a copied or unpickled object gets a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()
