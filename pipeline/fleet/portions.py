"""Items cut into portions, and what becomes of portions whose process died."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Failures after which a portion is cut into single items, and a single item is tried alone.
CUT_AFTER, ALONE_AFTER = 2, 3
# Portions that each worker would get of what is left, if all were of the next one's size.
SHARES = 2
# Where portions are to take a time: by how much the next one may be larger than the last ones, how many these are, and
# items at most, as those that follow may take far longer.
GROWTH, RECENT, MOST_ITEMS = 2, 8, 256


@dataclass(frozen=True)
class Part(Generic[T, R]):
    """Some neighbouring items and what came of them.

    Attributes:
        start: place of the first.
        result: None where the one item was lost.
        lost: why.
    """

    start: int
    items: tuple[T, ...]
    result: R | None
    lost: str = ""


@dataclass(frozen=True)
class Portion(Generic[T]):
    """Neighbouring items that are given to a worker at once.

    Attributes:
        start: place of the first.
        failures: how many processes have died over it.
    """

    start: int
    items: tuple[T, ...]
    failures: int = 0

    @property
    def is_last_try(self) -> bool:
        """Whether it is an item that is tried alone."""
        return self.failures >= ALONE_AFTER

    def span(self, name: Callable[[T], str]) -> str:
        """What it is, for messages: the first item and the last."""
        first, last = name(self.items[0]), name(self.items[-1])
        return first if len(self.items) == 1 else f"{first} … {last} ({len(self.items)})"


class Portions(Generic[T]):
    """What is still to be done: portions that failed, fresh ones, and items that are tried alone, last.

    Towards the end portions become smaller, so that workers end together: guided self-scheduling (Polychronopoulos and
    Kuck, IEEE Transactions on Computers, 1987).

    Args:
        size: items of the largest portion; with ``seconds``, of the first ones.
        workers: that share them; None: all portions but the last are of that size.
        seconds: that a portion should take, as far as ``took`` tells.
    """

    def __init__(self, items: Sequence[T], size: int, workers: int | None = None, seconds: float | None = None) -> None:
        self._items, self._size, self._workers, self._wanted = items, size, workers, seconds
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._fresh = 0  # place of the first item that nobody was given
        self._again: deque[Portion[T]] = deque()
        self._alone: deque[Portion[T]] = deque()

    @property
    def is_done(self) -> bool:
        """Whether all have been given to a worker, and none was put back."""
        return self._fresh >= len(self._items) and not self._again and not self._alone

    def next(self, *, is_alone: bool) -> Portion[T] | None:
        """The next one; None where there is none, or none that may run beside others."""
        if self._again:
            return self._again.popleft()
        if self._fresh < len(self._items):
            count = self._size
            if self._workers is not None:
                count = min(count, math.ceil((len(self._items) - self._fresh) / (SHARES * self._workers)))
            start, self._fresh = self._fresh, self._fresh + count
            return Portion(start, tuple(self._items[start : self._fresh]))
        return self._alone.popleft() if self._alone and is_alone else None

    def took(self, count: int, seconds: float) -> None:
        """Note how long a worker was at so many items; the slowest of the last portions tells how large the next one
        may be, and one in which there was nothing to do tells nothing."""
        if self._wanted is not None and count:
            self._recent.append((count, seconds))
            slowest = max(took / count for count, took in self._recent)
            largest = max(count for count, _ in self._recent)
            self._size = max(1, min(int(self._wanted / max(slowest, 1e-9)), GROWTH * largest, MOST_ITEMS))

    def put_back(self, portion: Portion[T]) -> None:
        """Keep a portion whose process died."""
        failures = portion.failures + 1
        if failures < CUT_AFTER:
            self._again.append(Portion(portion.start, portion.items, failures))
            return
        singles = [Portion(portion.start + i, (one,), failures) for i, one in enumerate(portion.items)]
        (self._alone if singles[0].is_last_try else self._again).extend(singles)
