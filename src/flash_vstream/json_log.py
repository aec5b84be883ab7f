"""The log of a server and its workers: JSON, one record per line, rate-limited so that it cannot fill a disk."""

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

BURST = 10
PERIOD_SECONDS = 60.0


class JsonFormatter(logging.Formatter):
    """Formats log records as JSON, one per line; ``extra`` fields become fields of the object."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        fields["event"] = record.getMessage()
        fields |= {name: value for name, value in vars(record).items() if name not in self._own}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class RateLimit(logging.Filter):
    """Lets through at most ``burst`` warnings and errors of one kind per ``period`` seconds.

    A kind is the line of code that logs. The first record after a suppressed run has the field
    ``suppressed``, the number left out. Records below WARNING always pass, since they are only logged
    on request.
    """

    def __init__(self, burst: int = BURST, period: float = PERIOD_SECONDS):
        super().__init__()
        self._burst, self._period = burst, period
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind, now = (record.pathname, record.lineno), time.monotonic()
        begin, count = self._kinds.get(kind, (now, 0))
        if now - begin >= self._period:
            if count > self._burst:
                record.suppressed = count - self._burst
            begin, count = now, 0
        self._kinds[kind] = (begin, count + 1)
        return count < self._burst


@dataclass(frozen=True)
class LogSettings:
    """How a process logs to stderr: as JSON or as Python does by default, and whether it logs each request."""

    as_json: bool = False
    requests: bool = False


_settings = LogSettings()


def log_settings() -> LogSettings:
    """How this process logs, for ``log_like`` in the processes that it starts."""
    return _settings


def log_like(settings: LogSettings) -> None:
    """Log this process as another one is logged."""
    if settings.as_json:
        log_to_stderr(settings.requests)


def log_to_stderr(requests: bool) -> None:
    """Log the whole process to stderr through one rate-limited handler; ``requests`` also logs each request."""
    global _settings
    _settings = LogSettings(True, requests)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RateLimit())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("flash_vstream").setLevel(logging.INFO if requests else logging.WARNING)
    logging.captureWarnings(True)
