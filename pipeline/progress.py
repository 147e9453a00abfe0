"""Progress of long loops: a bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
PLAIN_LINE_SECONDS = 15


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items and show how far it is."""
    if not log.isEnabledFor(logging.INFO):
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description, total, console=Console(stderr=True), transient=True)
    else:
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last > PLAIN_LINE_SECONDS:
                log.info("%s: %d of %d", description, done, total)
                last = time.monotonic()
            yield item
