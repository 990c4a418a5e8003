"""Logs to standard error, and the reference's flags for them: ``-v``, ``--zap-log-level``, ``--zap-encoder``."""

from __future__ import annotations

import datetime
import json
import logging
import re

from llmd_sched.errors import ConfigError

DEBUG_VERBOSITY = 3

ZAP_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "error": logging.ERROR, "panic": logging.CRITICAL}
_ZAP_NAMES = {logging.WARNING: "warn", logging.CRITICAL: "panic"}


def level(zap: str, verbosity: int) -> int:
    """``zap``: a name of ZAP_LEVELS or a number as of ``-v``, and empty for ``verbosity``: 0-2 info, 3 and more debug.
    Raises ConfigError."""
    if zap in ZAP_LEVELS:
        return ZAP_LEVELS[zap]
    if zap:
        if not re.fullmatch("[1-9][0-9]{0,2}", zap):
            raise ConfigError(f"{zap!r} is none of {', '.join(ZAP_LEVELS)}, nor a number as of -v", "--zap-log-level")
        verbosity = int(zap)
    return logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO


class JsonLines(logging.Formatter):
    """One object a line, with the keys of the reference: level, ts (RFC 3339), logger, msg, stacktrace."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {
            "level": _ZAP_NAMES.get(record.levelno, record.levelname.lower()),
            "ts": at.replace("+00:00", "Z"),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            line["stacktrace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(least: int, encoder: str = "console") -> None:
    """``least`` is a level; ``encoder`` ``json`` or ``console``."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if encoder == "json" else text)
    logging.basicConfig(level=least, handlers=[handler])
