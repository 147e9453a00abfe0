"""How far the work is, for whoever waits for it."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.closing import Closing
from pipeline.fleet.portions import Portion
from pipeline.fleet.workers import Crew
from pipeline.progress import PLAIN_LINE_SECONDS, bars

log = logging.getLogger(__name__)

# A portion is a straggler from so many times the median on, but no sooner than after these seconds.
STRAGGLES, STRAGGLING_SECONDS = 4.0, 30.0
# The median is that of so many portions, the last ones.
RECENT = 1000


class Show(Closing):
    """Progress, throughput and stragglers: a bar on a terminal, a line now and then elsewhere.

    Args:
        what: is done.
        total: items.
        name: of an item.
    """

    def __init__(self, what: str, total: int, crew: Crew, name: Callable[[Any], str]) -> None:
        self._what, self._total, self._crew, self._name = what, total, crew, name
        self._opened = self._last = time.monotonic()
        self._done = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)  # an item
        self._told: set[int] = set()
        self._shown = contextlib.ExitStack()
        self._bars = self._shown.enter_context(bars())
        self._task = self._bars.add_task(what, total=total) if self._bars is not None else None
        if self._bars is not None and self._task is not None:
            self._shown.callback(self._bars.remove_task, self._task)

    def add(self, portion: Portion[Any], seconds: float | None) -> None:
        """A portion is finished, after so many seconds; None where it was lost."""
        self._done += len(portion.items)
        if seconds is not None:
            self._seconds.append(seconds / len(portion.items))

    def refresh(self) -> None:
        """Show how far it is, and stragglers that have not been told of."""
        now = time.monotonic()
        at_work, rate = len(self._crew.running), self._rate
        if self._bars is not None and self._task is not None:
            said = f"{self._what}, {at_work} at work"
            self._bars.update(self._task, completed=self._done, description=said)
        elif now - self._last > PLAIN_LINE_SECONDS:
            self._last = now
            log.info("%s: %d of %d, %.1f a second, %d at work", self._what, self._done, self._total, rate, at_work)
        if self._seconds:
            self._name_stragglers(now)

    def close(self) -> None:
        self._shown.close()
        took, workers = self._seconds_at_work, len(self._crew.known)
        said = f"{self._what}: {self._done} in {took:.1f} s, {self._rate:.1f} a second, {workers} workers"
        log.info("%s, ready after %.1f s", said, time.monotonic() - self._opened - took)

    @property
    def _seconds_at_work(self) -> float:
        """Since the first worker was ready."""
        return time.monotonic() - self._crew.began if self._crew.began is not None else 0.0

    @property
    def _rate(self) -> float:
        """Items a second."""
        return self._done / max(self._seconds_at_work, 1e-9)

    def _name_stragglers(self, now: float) -> None:
        usual = statistics.median(self._seconds)
        for each in self._crew.running.values():
            took, expected = now - each.since, usual * len(each.portion.items)
            if took > max(STRAGGLING_SECONDS, STRAGGLES * expected) and each.portion.start not in self._told:
                self._told.add(each.portion.start)
                where, span = self._crew.known[each.worker].host, each.portion.span(self._name)
                log.warning("straggler: %s on %s takes %.0f s, usual are %.1f", span, where, took, expected)
