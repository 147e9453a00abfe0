"""Latency of everything that can run on this machine: FP32 on ONNX Runtime's CPU, and each engine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import Device, to_json
from pipeline.backends.base import Arrays, Runner
from pipeline.config import BenchmarkConfig
from pipeline.metrics.latency import summarise
from pipeline.reports import BenchmarkReport, Timing


@dataclass(frozen=True)
class Contestant:
    """One model to time; ``opens`` loads it."""

    name: str
    clock: Literal["GPU, CUDA events", "host, with copies"]
    bytes: int
    opens: Callable[[], AbstractContextManager[Any]]


def benchmark(
    contestants: list[Contestant],
    not_run: dict[str, str],
    feed: Callable[[Runner], Arrays],
    device: Device | None,
    config: BenchmarkConfig,
    folder: Path,
) -> BenchmarkReport:
    """Time each contestant in turn and write ``folder/report.json``.

    Args:
        feed: makes a contestant's input from a real image.
        not_run: reason by name of what was built but cannot run here.
    """
    timings = []
    for contestant in contestants:
        with contestant.opens() as runner:
            feeds = feed(runner)
            on_device = None
            if contestant.clock == "GPU, CUDA events":
                on_device = summarise(runner.device_milliseconds(feeds, config.seconds, config.warmup_seconds))
            batch = next(iter(feeds.values())).shape[0]
            timings.append(
                Timing(contestant.name, batch, contestant.bytes, on_device, summarise(_host(runner, feeds, config)))
            )
    report = BenchmarkReport(
        timings=tuple(timings),
        not_run=not_run,
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        device=device,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    (folder / "report.json").write_bytes(to_json(report))
    return report


def _host(runner: Runner, feeds: Arrays, config: BenchmarkConfig) -> NDArray[np.float64]:
    """Milliseconds of whole calls: a call returns when its results are on the host, so the host's clock is right."""
    warm_until = time.perf_counter() + config.warmup_seconds
    runner(feeds)
    while time.perf_counter() < warm_until:
        runner(feeds)
    laps: list[float] = []
    end = time.perf_counter() + config.seconds
    while not laps or time.perf_counter() < end:
        started = time.perf_counter_ns()
        runner(feeds)
        laps.append((time.perf_counter_ns() - started) / 1e6)
    return np.asarray(laps)
