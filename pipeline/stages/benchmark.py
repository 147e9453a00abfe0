"""Latency of everything that can run on this machine: FP32 on ONNX Runtime's CPU, each engine, and what rivals them.

Candidates take turns, those on the GPU with one another and those on the CPU too, so that they can be compared; where
INT8 and FP16 engines are among them, a verdict is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import __version__
from pipeline.artifacts import Device, TensorSpec, to_json
from pipeline.backends.base import Arrays
from pipeline.backends.nvml import Gauge, Meter
from pipeline.backends.runner import EngineRunner
from pipeline.config import BenchmarkConfig, Precision
from pipeline.contenders import GpuContender
from pipeline.contest import Contest, Contestant
from pipeline.errors import PipelineError
from pipeline.graph.io import load_model
from pipeline.metrics.interleaving import MOST_WARM_UPS, SETTLED, Interleaved
from pipeline.metrics.latency import summarise
from pipeline.own_figures import OwnClock
from pipeline.progress import paused
from pipeline.reports import BenchmarkReport, EngineAccount, OwnFigure, SpeedVerdict, Throughput, Timing
from pipeline.speed import account_for, judge, no_verdict
from pipeline.throughput import by_batch, by_streams

log = logging.getLogger(__name__)

WARM_UP = (
    f"turns until no candidate's median moves by more than {SETTLED:.1%} from one to the next, at most {MOST_WARM_UPS}"
)
# Half of an interval over its median, and the clock's range over its highest: more is worth a warning.
MOVED = 0.02


def benchmark(
    contestants: Sequence[Contestant],
    not_run: Mapping[str, str],
    feed: Callable[[TensorSpec], NDArray[Any]],
    device: Device | None,
    config: BenchmarkConfig,
    folder: Path,
    *,
    graph: Path,
    wants_verdict: bool,
    masks: bool = True,
    own_clocks: Mapping[tuple[str, str], OwnClock] | None = None,
) -> BenchmarkReport:
    """Time the contestants and write ``folder/report.json``.

    Args:
        contestants: the first is what the others' masks are compared with.
        not_run: reason by name of what cannot run here.
        feed: makes an input of a real image.
        graph: the clean ONNX file, in whose convolutions the work is counted.
        masks: outputs are masks or what they are decided from, and are compared as such.
        wants_verdict: INT8 was asked for, so it is judged against FP16, or said why it cannot be.
        own_clocks: other programs' by their name and a contestant's.

    Raises:
        PipelineError: a required contestant cannot run.
    """
    notes: list[str] = []
    with paused(), Contest(contestants, feed) as contest, _metered(contest, notes) as meter:
        gpu = contest.time(contest.on_gpu(), "GPU", config, meter)
        # Copies leave the GPU idle between inferences: its clocks and its energy are those of the turns before.
        whole = contest.time(contest.on_gpu(), "host", config, Meter(None))
        cpu = _on_cpu(contest, config)
        timings = [
            *_timings(contest, contest.on_cpu(), cpu, cpu, meter, masks),
            *_timings(contest, contest.on_gpu(), gpu, whole, meter, masks),
        ]
        slowed = {why for name in contest.on_gpu() for why in meter.usage(name, 2 * config.rounds).slowed}
        engines = _accounts(contest, gpu, graph, device, notes)
        throughput = _throughput(contest, config, feed, notes) if config.throughput else ()
        fed = {name: {entry.contender.source.name: entry.fed} for name, entry in contest.entries.items()}
        absent = {**not_run, **contest.not_run}
    # Other programs load the engine themselves: nothing else is in the GPU's memory by then.
    with paused():
        own = _own_figures(own_clocks or {}, fed, config, absent)
    report = BenchmarkReport(
        timings=tuple(timings),
        not_run=absent,
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        device=device,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        engines=engines,
        verdict=_verdict(gpu, engines, absent, config) if wants_verdict else None,
        settled=gpu.settled if gpu else None,
        rounds=config.rounds,
        notes=tuple(notes),
        warnings=_warnings({"GPU": gpu, "GPU with copies": whole, "CPU": cpu}, timings, slowed),
        throughput=throughput,
        own_figures=own,
        environment={
            "unet-trt": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "numpy": np.__version__,
        },
        warm_up=WARM_UP,
        warm_ups=gpu.warm_ups if gpu else 0,
    )
    (folder / "report.json").write_bytes(to_json(report))
    return report


@contextlib.contextmanager
def _metered(contest: Contest, notes: list[str]) -> Iterator[Meter]:
    """What reads the GPU during turns; a note where it cannot."""
    gauge = None
    if contest.on_gpu():
        try:
            gauge = Gauge()
        except PipelineError as error:
            notes.append(f"energy and clocks: not measured. {error.problem}")
    try:
        yield Meter(gauge)
    finally:
        if gauge is not None:
            gauge.close()


def _on_cpu(contest: Contest, config: BenchmarkConfig) -> Interleaved | None:
    """Turns of the candidates on the CPU. One alone has nobody to take turns with, and may be slow: it has one."""
    names = contest.on_cpu()
    if len(names) != 1:
        return contest.time(names, "host", config, Meter(None))
    (name,) = names
    log.info("timing %s on the CPU: %.0f s or a little more", name, config.seconds + config.warmup_seconds)
    times = contest.entries[name].contender.host_milliseconds(config.seconds, config.warmup_seconds)
    return Interleaved({name: np.median(times, keepdims=True)}, {name: times}, 1, True)


def _timings(
    contest: Contest,
    names: Sequence[str],
    turns: Interleaved | None,
    whole: Interleaved | None,
    meter: Meter,
    masks: bool,
) -> list[Timing]:
    """Of candidates that took turns with one another.

    Args:
        turns: as they are compared.
        whole: with the copies.
    """
    timings: list[Timing] = []
    if turns is None or whole is None:
        return timings
    fastest = min(names, key=lambda name: turns.latency(name).median)
    for name in names:
        entry, usage = contest.entries[name], meter.usage(name, 2 * len(turns.rounds[name]))
        contender, known = entry.contender, entry.contestant
        median = turns.latency(name)
        try:
            copies = [summarise(times) for times in contender.transfers()] if contender.on_gpu else [None, None]
        except PipelineError as error:
            contest.drop(name, error)
            continue
        timings.append(
            Timing(
                name=name,
                batch=len(entry.fed),
                bytes=known.bytes,
                device=turns.summary(name) if contender.on_gpu else None,
                end_to_end=whole.summary(name),
                median_ms=median if contender.on_gpu else None,
                cuda_graph=contender.captured,
                ran=contender.ran,
                to_gpu=copies[0],
                from_gpu=copies[1],
                rounds_ms=tuple(turns.rounds[name].tolist()),
                ratio=turns.ratio(name, fastest) if len(names) > 1 else None,
                gpu_bytes=contender.gpu_bytes,
                build_seconds=entry.build_seconds,
                agreement=contest.agreement(name) if masks else None,
                accuracy=known.accuracy,
                watts=usage.watts,
                joules=None if usage.watts is None else usage.watts * median.median / 1000 / len(entry.fed),
                sm_mhz=usage.sm_mhz,
            )
        )
    return timings


def _accounts(
    contest: Contest, turns: Interleaved | None, graph: Path, device: Device | None, notes: list[str]
) -> dict[Precision, EngineAccount]:
    """Where the time of each engine goes; a note where that cannot be found out."""
    engines: dict[Precision, EngineAccount] = {}
    for name, entry in contest.entries.items():
        precision, contender = entry.contestant.precision, entry.contender
        if precision is None or turns is None or not isinstance(contender, GpuContender):
            continue
        whole = turns.latency(name).median
        runner: Any = contender.runner
        try:
            engines[precision] = account_for(
                runner, contender.fed, load_model(graph), entry.contestant.engine_sha256, device, whole
            )
        except PipelineError as error:
            log.warning("%s: the time of its layers is not known: %s", name, error.problem)
            notes.append(f"{name}: the time of its layers is not known: {error.problem}")
    return engines


def _throughput(
    contest: Contest, config: BenchmarkConfig, feed: Callable[[TensorSpec], NDArray[Any]], notes: list[str]
) -> tuple[Throughput, ...]:
    """Images a second of every batch and number of streams that a candidate takes; a note for what fails."""
    found: list[Throughput] = []
    for name, entry in contest.entries.items():
        contender = entry.contender
        batches = [batch for batch in config.batches if contender.takes(batch)] or [len(entry.fed)]
        try:
            image = feed(contender.at(1))
            for batch in batches:
                found.append(by_batch(name, contender, image, batch, config.seconds))
            runner = contender.runner if isinstance(contender, GpuContender) else None
            if isinstance(runner, EngineRunner):
                streams = by_streams(name, runner, entry.fed, config.streams, config.seconds)
                found += streams
                if len(streams) < len(config.streams):
                    notes.append(f"{name}: the GPU's memory suffices for fewer streams than {max(config.streams)}")
        except PipelineError as error:
            notes.append(f"{name}: throughput is not known, or not all of it: {error.problem}")
    return tuple(found)


def _own_figures(
    clocks: Mapping[tuple[str, str], OwnClock],
    fed: Mapping[str, Arrays],
    config: BenchmarkConfig,
    not_run: dict[str, str],
) -> tuple[OwnFigure, ...]:
    """What other programs say of the engines that were timed; ``not_run`` gets those that say nothing."""
    figures = []
    for (tool, name), clock in clocks.items():
        if name not in fed:
            continue
        try:
            figures.append(clock(name, fed[name], config.seconds, config.warmup_seconds))
        except PipelineError as error:
            not_run[f"{tool}, {name}"] = error.summary
    return tuple(figures)


def _warnings(
    contests: Mapping[str, Interleaved | None], timings: Sequence[Timing], slowed: Set[str]
) -> tuple[str, ...]:
    """What speaks against the figures: latencies and clocks that moved."""
    found = [
        f"{place}: the latencies had not settled after {turns.warm_ups} turns; other programs may use the machine"
        for place, turns in contests.items()
        if turns is not None and not turns.settled
    ]
    for timing in timings:
        median = timing.median_ms
        if median is not None and median.spread > MOVED * median.median:
            found.append(f"{timing.name}: its rounds spread by ±{median.spread / median.median:.1%}")
    clocks = [mhz for timing in timings for mhz in timing.sm_mhz or ()]
    if clocks and max(clocks) - min(clocks) > MOVED * max(clocks):
        found.append(f"the GPU's clock moved between {min(clocks)} and {max(clocks)} MHz")
    if slowed:
        found.append(f"the GPU held its clocks down: {', '.join(sorted(slowed))}")
    return tuple(found)


def _verdict(
    turns: Interleaved | None,
    engines: Mapping[Precision, EngineAccount],
    not_run: Mapping[str, str],
    config: BenchmarkConfig,
) -> SpeedVerdict:
    timed = turns.rounds if turns is not None else {}
    missing = [name for name in ("int8", "fp16") if name not in timed]
    if turns is None or missing:
        why = f"no {missing[0].upper()} engine runs on this machine"
        reason = not_run.get(missing[0])
        return no_verdict(config.min_speedup, f"{why} ({reason})" if reason else why)
    return judge(turns.ratio("fp16", "int8"), config.min_speedup, engines.get("int8"), engines.get("fp16"))
