"""Logs in JSON, one object a line; no text of a prompt or an answer is in them unless asked for."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """What was said, and the facts that came with it as `extra={"facts": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the server's log, and uvicorn's, to stderr in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("loramix", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level if name == "loramix" else logging.WARNING)
        logger.propagate = False
