"""Logs in JSON, one object a line; no text of a prompt or an answer is in them unless asked for."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path


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


def log_to(file: Path | None = None, level: int = logging.INFO) -> None:
    """Send the server's log, and uvicorn's, to stderr in this form, and to the end of a file."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(JsonLines())
    for name in ("loramix", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = list(handlers)
        logger.setLevel(level if name == "loramix" else logging.WARNING)
        logger.propagate = False
