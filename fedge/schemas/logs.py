"""Log lines as events with fields: `update_rejected round=12 device=pi-7 reason=wrong_shape`.

Events go through the standard library's logging to stderr, as text for people and journald or as
one JSON object a line for programs. Fields are facts: never payloads, examples, keys or weights.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

LogFormat = Literal["text", "json"]
Field = str | int | float | bool | None

_FIELDS = "fedge_fields"


class EventLog:
    """A logger whose messages are event names and whose keyword arguments are fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, **fields: Field) -> None:
        """What an operator reads when all is well."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Field) -> None:
        """What went wrong and was dealt with."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Field) -> None:
        """What needs somebody."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Field) -> None:
        """What nobody foresaw, with its traceback. In an `except` block."""
        self._log(logging.ERROR, event, fields, with_traceback=True)

    def _log(
        self, level: int, event: str, fields: dict[str, Field], *, with_traceback: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=with_traceback)


class TextFormatter(logging.Formatter):
    """`12:00:00 INFO  event field=value …`, values with spaces in quotes, unknown ones left out."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback if the record has one."""
        parts = [self.formatTime(record, "%H:%M:%S"), f"{record.levelname:<7}", record.getMessage()]
        known = ((n, value) for n, value in _fields(record).items() if value not in (None, ""))
        parts += [f"{name}={_text(value)}" for name, value in known]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `ts`, `level`, `event` and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, with any traceback in the field `traceback`."""
        line: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Sends the events of this process to stderr in the given format.

    `level` is for Fedge; of the libraries below it only warnings are shown.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fedge").setLevel(level)


def _fields(record: logging.LogRecord) -> dict[str, Field]:
    found: dict[str, Field] = getattr(record, _FIELDS, {})
    return found


def _text(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text) if not text or any(c in text for c in ' "=\n') else text
