"""Latency of everything that can run on this machine: FP32 on ONNX Runtime's CPU, and each engine.

Engines take turns on the GPU, so that they can be compared; where INT8 and FP16 are among them, a verdict is written.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from pipeline.artifacts import Device, to_json
from pipeline.backends.base import Arrays, Runner
from pipeline.config import BenchmarkConfig, Precision
from pipeline.errors import PipelineError
from pipeline.graph.io import load_model
from pipeline.metrics.interleaving import Interleaved, interleave
from pipeline.metrics.latency import summarise
from pipeline.reports import BenchmarkReport, EngineAccount, SpeedVerdict, Timing
from pipeline.speed import account_for, judge, no_verdict

log = logging.getLogger(__name__)

# Of a turn's length, run before it is measured: the GPU changes from one engine's memory to another's.
TURN_WARM_UP = 0.2


@dataclass(frozen=True)
class Contestant:
    """One model to time; ``opens`` loads it. An engine on the GPU has a precision and a hash."""

    name: str
    clock: Literal["GPU, CUDA events", "host, with copies"]
    bytes: int
    opens: Callable[[], AbstractContextManager[Any]]
    precision: Precision | None = None
    engine_sha256: str = ""


def benchmark(
    contestants: list[Contestant],
    not_run: dict[str, str],
    feed: Callable[[Runner], Arrays],
    device: Device | None,
    config: BenchmarkConfig,
    folder: Path,
    *,
    graph: Path,
    wants_verdict: bool,
) -> BenchmarkReport:
    """Time the contestants and write ``folder/report.json``.

    Args:
        feed: makes a contestant's input from a real image.
        not_run: reason by name of what was built but cannot run here.
        graph: the clean ONNX file, in whose convolutions the work is counted.
        wants_verdict: INT8 was asked for, so it is judged against FP16, or said why it cannot be.
    """
    notes: list[str] = []
    engines: dict[Precision, EngineAccount] = {}
    turns: Interleaved | None = None
    with ExitStack() as stack:
        opened = [(each, stack.enter_context(each.opens())) for each in contestants]
        fed = {each.name: feed(runner) for each, runner in opened}
        on_gpu = {each.name: runner for each, runner in opened if each.clock == "GPU, CUDA events"}
        if on_gpu:
            turns = take_turns(on_gpu, fed, config)
        captured = {name: runner.captured for name, runner in on_gpu.items()}
        timings = tuple(_timing(each, runner, fed[each.name], config, turns, captured) for each, runner in opened)
        for each, runner in opened:
            if each.precision is None or turns is None:
                continue
            whole = turns.latency(each.name).median
            try:
                engines[each.precision] = account_for(
                    runner, fed[each.name], load_model(graph), each.engine_sha256, device, whole
                )
            except PipelineError as error:
                log.warning("%s: the time of its layers is not known: %s", each.name, error.problem)
                notes.append(f"{each.name}: the time of its layers is not known: {error.problem}")
    report = BenchmarkReport(
        timings=timings,
        not_run=not_run,
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        device=device,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        engines=engines,
        verdict=_verdict(turns, engines, not_run, config) if wants_verdict else None,
        settled=turns.settled if turns else None,
        rounds=config.rounds,
        notes=tuple(notes),
    )
    (folder / "report.json").write_bytes(to_json(report))
    return report


def take_turns(runners: Mapping[str, Any], fed: Mapping[str, Arrays], config: BenchmarkConfig) -> Interleaved:
    """Latencies on the GPU of runners that take turns, each after warming up.

    Args:
        fed: inputs by runner's name.
    """
    seconds = config.seconds / (2 * config.rounds)

    def turn(name: str, warm_up: float = TURN_WARM_UP * seconds) -> NDArray[np.float64]:
        times: NDArray[np.float64] = runners[name].device_milliseconds(fed[name], seconds, warm_up)
        return times

    for name in runners:
        turn(name, config.warmup_seconds)
    turns = interleave({name: functools.partial(turn, name) for name in runners}, config.rounds)
    if not turns.settled:
        log.warning("the GPU's latencies did not settle in %d turns; other programs may use it", turns.warm_ups)
    return turns


def _timing(
    contestant: Contestant,
    runner: Runner,
    feeds: Arrays,
    config: BenchmarkConfig,
    turns: Interleaved | None,
    captured: Mapping[str, bool],
) -> Timing:
    name, batch = contestant.name, next(iter(feeds.values())).shape[0]
    host = summarise(_host(runner, feeds, config))
    if turns is None or name not in turns.rounds:
        return Timing(name, batch, contestant.bytes, None, host)
    return Timing(name, batch, contestant.bytes, turns.summary(name), host, turns.latency(name), captured[name])


def _verdict(
    turns: Interleaved | None,
    engines: Mapping[Precision, EngineAccount],
    not_run: Mapping[str, str],
    config: BenchmarkConfig,
) -> SpeedVerdict:
    timed = turns.rounds if turns is not None else {}
    missing = [name for name in ("int8", "fp16") if name not in timed]
    if turns is None or missing:
        why = f"no {missing[0].upper()} engine runs on this machine. {not_run.get(missing[0], '')}"
        return no_verdict(config.min_speedup, why.strip())
    return judge(turns.ratio("fp16", "int8"), config.min_speedup, engines.get("int8"), engines.get("fp16"))


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
