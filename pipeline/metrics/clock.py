"""Milliseconds of work that is repeated: by the host's clock, or by events that the GPU records around it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Inferences timed between two waits: enough to keep the GPU busy, few enough to stop in time.
LARGEST_CHUNK = 64
CHUNK_SECONDS = 0.1


class GpuClock(Protocol):
    """The events of one stream, whatever library makes them."""

    def event(self) -> Any: ...

    def record(self, event: Any) -> None:
        """Enqueue a point whose time the GPU keeps."""
        ...

    def between(self, before: Any, after: Any) -> float:
        """Milliseconds between two points that the GPU has passed."""
        ...

    def wait(self) -> None:
        """Until the GPU has done all that is enqueued."""
        ...

    def close(self, event: Any) -> None: ...


def host_milliseconds(call: Callable[[], object], seconds: float, warmup_seconds: float) -> NDArray[np.float64]:
    """Milliseconds of every whole call, each of which returns when its results are on the host.

    Args:
        seconds, warmup_seconds: to measure for, and to run before; at least one call each.

    Returns:
        float64 (n,), in order.
    """
    warm_until = time.perf_counter() + warmup_seconds
    call()
    while time.perf_counter() < warm_until:
        call()
    laps: list[float] = []
    end = time.perf_counter() + seconds
    while not laps or time.perf_counter() < end:
        started = time.perf_counter_ns()
        call()
        laps.append((time.perf_counter_ns() - started) / 1e6)
    return np.asarray(laps)


def gpu_milliseconds(
    clock: GpuClock, launch: Callable[[], object], seconds: float, warmup_seconds: float
) -> NDArray[np.float64]:
    """GPU milliseconds of every launch, by events around it; launches follow one another without the host's waiting.

    Args:
        seconds, warmup_seconds: host time to measure for, and to run before; at least one launch each.

    Returns:
        float64 (n,), in order.
    """
    events: list[tuple[Any, Any]] = []
    times: list[float] = []
    try:
        once = _warm_up(clock, launch, warmup_seconds)
        for _ in range(max(1, min(LARGEST_CHUNK, math.ceil(CHUNK_SECONDS / once)))):
            events.append((clock.event(), clock.event()))
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            for before, after in events:
                clock.record(before)
                launch()
                clock.record(after)
            clock.wait()
            times.extend(clock.between(before, after) for before, after in events)
    finally:
        for pair in events:
            for event in pair:
                clock.close(event)
    return np.array(times, np.float64)


def gpu_spans(clock: GpuClock, steps: list[Callable[[], object]], repeats: int) -> NDArray[np.float64]:
    """GPU milliseconds of steps that follow one another, repeated: float64 (steps, repeats)."""
    marks = [clock.event() for _ in range(len(steps) + 1)]
    spans = np.empty((len(steps), repeats))
    try:
        for lap in range(repeats):
            clock.record(marks[0])
            held = []
            for step, mark in zip(steps, marks[1:], strict=True):
                held.append(step())  # what is being copied has to live until the GPU has done it
                clock.record(mark)
            clock.wait()
            spans[:, lap] = [clock.between(a, b) for a, b in itertools.pairwise(marks)]
            del held
    finally:
        for mark in marks:
            clock.close(mark)
    return spans


def _warm_up(clock: GpuClock, launch: Callable[[], object], seconds: float) -> float:
    """Run for a while; host seconds of one launch, above 0."""
    start = time.perf_counter()
    count = 0
    while True:
        launch()
        clock.wait()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return max(elapsed / count, 1e-6)
