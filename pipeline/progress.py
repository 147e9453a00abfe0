"""Progress of long loops: a bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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


def bars() -> Progress | None:
    """Bars that are running, for tasks to be added; None where no terminal shows them, and with --quiet."""
    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        return None
    from rich.console import Console
    from rich.progress import Progress

    running = Progress(console=Console(stderr=True), transient=True)
    running.start()
    return running


class Phases:
    """Progress of nested phases, told by name as they start, step and finish; a context manager.

    A bar per phase that is going on, the innermost last; on no terminal a line about the innermost now and then.
    May be called from several threads.

    Args:
        description: of the whole.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._lock = threading.Lock()
        self._steps: dict[str, tuple[int, int]] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Phases:
        self._bars = bars()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._steps[phase] = (0, steps)
            if self._bars is not None:
                indent = "  " * len(self._tasks)
                self._tasks[phase] = self._bars.add_task(f"{self._description}: {indent}{phase}", total=steps)

    def step(self, phase: str, done: int) -> None:
        """``done`` steps of a phase are finished."""
        with self._lock:
            _, steps = self._steps.get(phase, (0, done))
            self._steps[phase] = (done, steps)
            if self._bars is not None and phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=done)
            elif time.monotonic() - self._last > PLAIN_LINE_SECONDS:
                self._last = time.monotonic()
                log.info("%s: %s, %d of %d", self._description, phase, done, steps)

    def finish(self, phase: str) -> None:
        with self._lock:
            self._steps.pop(phase, None)
            task = self._tasks.pop(phase, None)
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
