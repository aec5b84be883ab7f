"""A count of what is in progress, with a limit."""

import threading


class InProgress:
    """Counts things in progress, at most ``most`` at once. May be used from any thread."""

    def __init__(self, most: int):
        self.most = most
        self.count = 0
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Count one more; False, and nothing is counted, if there are ``most`` already."""
        with self._lock:
            if self.count >= self.most:
                return False
            self.count += 1
            return True

    def end(self) -> None:
        """Count one less; raises ``ValueError`` if there is none, since something was ended twice."""
        with self._lock:
            if not self.count:
                raise ValueError("more was ended than had begun")
            self.count -= 1
