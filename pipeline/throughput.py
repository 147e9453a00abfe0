"""Images a second: of batches one after another, and of several batches under way at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.lanes import Lane, Lanes
from pipeline.backends.runner import EngineRunner
from pipeline.contenders import Contender
from pipeline.reports import Throughput

# Of the time to measure for, run before it.
WARM_UP = 0.2


def by_batch(name: str, contender: Contender, image: NDArray[Any], batch: int, seconds: float) -> Throughput:
    """One batch after the other, from the median batch: on the GPU alone where it runs there.

    Args:
        image: input of one image, (1, ...).

    Raises:
        PipelineError: it cannot run so many images at once.
    """
    contender.feed(np.repeat(image, batch, axis=0))
    timed = contender.gpu_milliseconds if contender.on_gpu else contender.host_milliseconds
    median = float(np.median(timed(seconds, WARM_UP * seconds)))
    return Throughput(name, batch, 1, 1000 * batch / median, "GPU" if contender.on_gpu else "host")


def by_streams(
    name: str, runner: EngineRunner, batch: NDArray[Any], streams: Sequence[int], seconds: float
) -> tuple[Throughput, ...]:
    """An engine's batches under way on several streams, with their copies from and to pinned memory.

    Returns:
        One for each number of streams that the GPU's memory suffices for, fewest first.

    Raises:
        EngineError: a failed execution.
    """
    found = []
    with closing(Lanes(runner.twin(), max(streams))) as lanes:
        taken: list[Lane] = []
        try:
            for count in sorted(streams):
                while len(taken) < count and (lane := lanes.take(wait=False)) is not None:
                    taken.append(lane)
                if len(taken) < count:
                    break
                rate = len(batch) * _batches_per_second(taken, batch, seconds)
                found.append(Throughput(name, len(batch), count, rate, "host"))
        finally:
            for lane in taken:
                lane.settle()
                lanes.give(lane)
    return tuple(found)


def _batches_per_second(lanes: Sequence[Lane], batch: NDArray[Any], seconds: float) -> float:
    for lane in lanes:
        lane.memory(batch.shape)[...] = batch
        lane.start()
    begin = time.perf_counter() + WARM_UP * seconds
    counted_from, count = None, 0
    while True:
        for lane in lanes:
            lane.finish()
            now = time.perf_counter()
            if counted_from is not None:
                count += 1
                if now - counted_from >= seconds:
                    return count / (now - counted_from)
            elif now >= begin:
                counted_from = now
            lane.start()
