"""Log records as JSON, one a line."""

import json
import logging
from typing import Any


class JsonFormatter(logging.Formatter):
    """Log records as JSON, one a line."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        told["event"] = record.getMessage()
        told |= {name: value for name, value in vars(record).items() if name not in self._own}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)
