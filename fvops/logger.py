"""Loggers that know which rank they speak for.

Importing fvops configures nothing: records go to the ``fvops`` logger and from there to whatever the program has set
up. ``FVOPS_LOG_LEVEL`` asks for a handler of our own on that logger (never on the root logger).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from fvops import envs

__all__ = ["RankLogger", "init_logger"]

_said: set[tuple[str, int, str]] = set()


class RankLogger(logging.LoggerAdapter):
    """A logger whose ``info`` speaks on chosen ranks only, and which can say a thing once per process."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs

    def info(  # type: ignore[override]
        self,
        msg: object,
        *args: object,
        main_process_only: bool = False,
        local_main_process_only: bool = True,
        **kwargs: Any,
    ) -> None:
        """Log at INFO: by default on local rank 0 of each node, with ``main_process_only`` on global rank 0 only."""
        if main_process_only and envs.RANK != 0:
            return
        if local_main_process_only and not main_process_only and envs.LOCAL_RANK != 0:
            return
        kwargs.setdefault("stacklevel", 2)  # the record names our caller, not this file
        self.log(logging.INFO, msg, *args, **kwargs)

    def info_once(self, msg: str, *args: object) -> None:
        """Log `msg` at INFO the first time this process says it."""
        self._once(logging.INFO, msg, *args)

    def warning_once(self, msg: str, *args: object) -> None:
        """Log `msg` at WARNING the first time this process says it."""
        self._once(logging.WARNING, msg, *args)

    def _once(self, level: int, msg: str, *args: object) -> None:
        key = (self.logger.name, level, msg % args if args else msg)
        if key not in _said:
            _said.add(key)
            self.log(level, msg, *args, stacklevel=3)


def init_logger(name: str) -> RankLogger:
    """A `RankLogger` for the module `name`."""
    level = envs.FVOPS_LOG_LEVEL
    root = logging.getLogger("fvops")
    if level is not None and not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank{envs.RANK} %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(level)
    return RankLogger(logging.getLogger(name), {})
