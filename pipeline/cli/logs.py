"""Logging of the commands: to the standard error, above the bars of what is under way."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger("pipeline")


def set_up_logging(debug: bool, quiet: bool) -> None:
    """Messages of the program from INFO on; quiet: warnings alone; debug: all, with their levels."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s" if debug else "%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # CPython 3.10 cannot subscript it
    """Writes to what is ``sys.stderr`` at the time: bars put themselves there, so that lines come above them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass
