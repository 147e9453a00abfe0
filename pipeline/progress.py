"""Progress of long work: bars with pace and remaining time on a terminal, plain lines elsewhere, quiet with --quiet."""

from __future__ import annotations

import contextlib
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
# Earlier a pace says nothing.
SURE_SECONDS = 0.2


class _Display:
    """The one live display of this process: a terminal has room for one, and stages, loops and builders nest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = self._pauses = 0
        self._bars: Progress | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[Progress | None]:
        """The bars while anybody needs them; None where no terminal or nobody wants to see any."""
        if not log.isEnabledFor(logging.INFO) or not sys.stderr.isatty():
            yield None
            return
        with self._lock:
            self._users += 1
            if self._bars is None:
                self._bars = _new_bars()
                if not self._pauses:
                    self._bars.start()
            bars = self._bars
        try:
            yield bars
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._bars = None
                    bars.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is drawn within the block."""
        with self._lock:
            self._pauses += 1
            if self._bars is not None:
                self._bars.stop()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if self._bars is not None and not self._pauses:
                    self._bars.start()


_display = _Display()


def _new_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    class Pace(TextColumn):
        """Steps, how many a second, and the time that is left; of work without steps the time that has passed."""

        def render(self, task: Task) -> Text:
            return Text(pace(task.completed, task.total, task.elapsed or 0.0, task.speed))

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), Pace(""))
    # Results go to stdout, also while bars are shown.
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def pace(done: float, total: float | None, elapsed: float, speed: float | None) -> str:
    """What stands beside a bar.

    Args:
        total: steps in all; None: not known.
        elapsed: seconds so far.
        speed: steps a second; None: not known yet.
    """
    if total is None:
        return duration(elapsed)
    steps = f"{done:.0f} of {total:.0f}"
    if not speed or elapsed < SURE_SECONDS:
        return f"{steps}, {duration(elapsed)}"
    rate = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
    return f"{steps}, {rate}, {duration((total - done) / speed)} left"


def duration(seconds: float) -> str:
    """Such as 0:07 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def paused() -> contextlib.AbstractContextManager[None]:
    """Draw nothing within the block: whatever is timed there, a thread that draws would slow it."""
    return _display.paused()


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """Show, within the block, that something goes on and for how long; nothing where there is no terminal."""
    with _display.shown() as bars:
        task = bars.add_task(description, total=None) if bars is not None else None
        try:
            yield
        finally:
            if bars is not None and task is not None:
                bars.remove_task(task)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items and show how far it is, how fast, and how long it will take."""
    with _display.shown() as bars:
        started = last = time.monotonic()
        task = bars.add_task(description, total=total) if bars is not None else None
        try:
            for done, item in enumerate(items):
                now = time.monotonic()
                if bars is not None and task is not None:
                    bars.update(task, completed=done)
                elif now - last > PLAIN_LINE_SECONDS:
                    last = now
                    log.info("%s: %s", description, pace(done, total, now - started, done / max(now - started, 1e-9)))
                yield item
        finally:
            if bars is not None and task is not None:
                bars.remove_task(task)


def bars() -> contextlib.AbstractContextManager[Progress | None]:
    """The bars of this process, for tasks to be added; None where no terminal shows them, and with --quiet."""
    return _display.shown()


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
        self._stack = contextlib.ExitStack()
        self._last = time.monotonic()

    def __enter__(self) -> Phases:
        self._bars = self._stack.enter_context(bars())
        return self

    def __exit__(self, *exc: object) -> None:
        for phase in list(self._tasks):
            self.finish(phase)
        self._stack.close()

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
            steps = max(steps, done)
            self._steps[phase] = (done, steps)
            if self._bars is not None and phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=done, total=steps)
            elif time.monotonic() - self._last > PLAIN_LINE_SECONDS:
                self._last = time.monotonic()
                log.info("%s: %s, %d of %d", self._description, phase, done, steps)

    def finish(self, phase: str) -> None:
        with self._lock:
            self._steps.pop(phase, None)
            task = self._tasks.pop(phase, None)
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
