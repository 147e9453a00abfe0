"""Candidates that take turns: loaded, warmed up and timed beside one another; who falls out is named, with why."""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import TensorSpec
from pipeline.backends.nvml import Meter
from pipeline.closing import Closing
from pipeline.config import BenchmarkConfig, Precision
from pipeline.contenders import Contender, GpuContender
from pipeline.engines import load_engine
from pipeline.errors import PipelineError
from pipeline.graph.io import load_model
from pipeline.metrics.interleaving import Interleaved, interleave
from pipeline.metrics.latency import Estimate
from pipeline.progress import paused
from pipeline.reports import Accuracy, EngineAccount
from pipeline.speed import account_for

log = logging.getLogger(__name__)

# Of a turn's length, run before it is measured: the GPU changes from one candidate's memory to another's.
TURN_WARM_UP = 0.2
LOGITS_RANK = 4


@dataclass(frozen=True)
class Contestant:
    """One candidate.

    Attributes:
        opens: loads it.
        bytes: of its file; None where it has none.
        precision, engine_sha256: of an engine.
        required: an error ends the benchmark; others go without it.
        compiles: the first inference is what takes long.
    """

    name: str
    opens: Callable[[], Contender]
    bytes: int | None = None
    precision: Precision | None = None
    engine_sha256: str = ""
    build_seconds: float | None = None
    accuracy: Accuracy | None = None
    required: bool = True
    compiles: bool = False


@dataclass
class Entry:
    """A candidate in the contest; ``output`` is of the image that is timed, ``held`` closes it."""

    contestant: Contestant
    contender: Contender
    fed: NDArray[Any]
    output: NDArray[Any]
    build_seconds: float | None
    held: ExitStack


class _FellOut(Exception):
    """A candidate that the contest goes on without."""

    def __init__(self, name: str, error: PipelineError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


class Contest(Closing):
    """The candidates that run here, each loaded and fed one image; a context manager.

    Args:
        feed: makes an input of a real image.

    Attributes:
        entries: by name, in the order given.
        not_run: why others do not take part, by name.

    Raises:
        PipelineError: a required candidate cannot run; from every method.
    """

    def __init__(self, contestants: Sequence[Contestant], feed: Callable[[TensorSpec], NDArray[Any]]) -> None:
        self.entries: dict[str, Entry] = {}
        self.not_run: dict[str, str] = {}
        with ExitStack() as stack:
            for each in contestants:
                log.info("loading %s", each.name)
                try:
                    self.entries[each.name] = self._enter(each, feed, stack)
                except PipelineError as error:
                    if each.required:
                        raise
                    self._leave_out(each.name, error)
            self._stack = stack.pop_all()

    def on_gpu(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.contender.on_gpu]

    def on_cpu(self) -> list[str]:
        return [name for name, entry in self.entries.items() if not entry.contender.on_gpu]

    def agreement(self, name: str) -> float:
        """Share of the fed image's pixels with the same class as the first candidate's."""
        reference = _classes(next(iter(self.entries.values())).output)
        return float((_classes(self.entries[name].output) == reference).mean())

    def time(
        self, names: Sequence[str], clock: Literal["GPU", "host"], config: BenchmarkConfig, meter: Meter
    ) -> Interleaved | None:
        """Turns of the candidates, on the GPU alone or from host array to host array.

        One that falls out leaves the others to begin again; None where nobody is left.
        """
        left = list(names)
        while left:
            try:
                return self._turns(left, clock, config, meter)
            except _FellOut as fallen:
                left.remove(fallen.name)
                self.drop(fallen.name, fallen.error)
        return None

    def drop(self, name: str, error: PipelineError) -> None:
        """Go on without a candidate.

        Raises:
            PipelineError: the error, of a required one.
        """
        if self.entries[name].contestant.required:
            raise error
        self.entries.pop(name).held.close()
        self._leave_out(name, error)

    def close(self) -> None:
        self._stack.close()

    def _enter(self, contestant: Contestant, feed: Callable[[TensorSpec], NDArray[Any]], stack: ExitStack) -> Entry:
        with ExitStack() as own:
            contender = own.enter_context(contestant.opens())
            fed, started = feed(contender.source), time.perf_counter()
            output = contender.feed(fed)
            seconds = time.perf_counter() - started
            built = seconds if contestant.compiles else contestant.build_seconds
            held = stack.enter_context(own.pop_all())
        return Entry(contestant, contender, fed, output, built, held)

    def _turns(
        self, names: Sequence[str], clock: Literal["GPU", "host"], config: BenchmarkConfig, meter: Meter
    ) -> Interleaved:
        seconds = config.seconds / (2 * config.rounds)

        def turn(name: str, warm_up: float = TURN_WARM_UP * seconds) -> NDArray[np.float64]:
            contender = self.entries[name].contender
            timed = contender.gpu_milliseconds if clock == "GPU" else contender.host_milliseconds
            try:
                with meter.over(name):
                    return timed(seconds, warm_up)
            except PipelineError as error:
                raise _FellOut(name, error) from error

        whole = len(names) * (config.warmup_seconds + config.seconds * (1 + 1 / config.rounds))
        log.info("timing %s on the %s: %.0f s or a little more", ", ".join(names), clock, whole)
        for name in names:
            turn(name, config.warmup_seconds)
        return interleave({name: functools.partial(turn, name) for name in names}, config.rounds)

    def _leave_out(self, name: str, error: PipelineError) -> None:
        self.not_run[name] = error.summary
        log.info("%s: not measured", name)


class Choices(Closing):
    """Choices of mixed precision as engines on this machine's GPU, each built once; a context manager.

    A choice is the convolutions that stay FP16.

    Args:
        build: an engine of a choice, into an empty folder.
        feed: makes an input of one image.
        graph: that the engines are built from.

    Raises:
        EngineError, UnsupportedError: a choice that cannot be built or run; from every method.
    """

    def __init__(
        self,
        build: Callable[[tuple[str, ...], Path], object],
        feed: Callable[[TensorSpec], NDArray[Any]],
        config: BenchmarkConfig,
        graph: Path,
    ) -> None:
        self._build, self._feed, self._config, self._graph = build, feed, config, graph
        self._made = tempfile.TemporaryDirectory(prefix="unet-trt-")
        self._plans: dict[tuple[str, ...], Path] = {}

    def time(self, choices: Mapping[str, tuple[str, ...]]) -> dict[str, Estimate]:
        """Milliseconds on the GPU of choices, as engines that take turns, by name."""
        contestants = []
        for name, half in choices.items():
            opens = functools.partial(load_engine, self._plan(half))
            contestants.append(Contestant(name, functools.partial(GpuContender, opens, "engine")))
        with paused(), Contest(contestants, self._feed) as contest:
            turns = contest.time(list(choices), "GPU", self._config, Meter(None))
            return {name: turns.latency(name) for name in choices} if turns else {}

    def profile(self, half: tuple[str, ...], whole_ms: float) -> EngineAccount:
        """Where the time of one choice goes, whose whole inference takes ``whole_ms``.

        Raises:
            EngineError: the engine tells nothing of its layers.
        """
        with paused(), load_engine(self._plan(half)) as runner:
            feeds = {source.name: self._feed(source) for source in runner.inputs}
            return account_for(runner, feeds, load_model(self._graph), "", None, whole_ms)

    def close(self) -> None:
        self._made.cleanup()

    def _plan(self, half: tuple[str, ...]) -> Path:
        if half not in self._plans:
            folder = Path(self._made.name, str(len(self._plans)))
            folder.mkdir()
            self._build(half, folder)
            self._plans[half] = folder / "model.engine"
        return self._plans[half]


def _classes(output: NDArray[Any]) -> NDArray[Any]:
    """Class ids (N, H, W) of labels, logits or probabilities."""
    return output.argmax(1) if output.ndim == LOGITS_RANK else output
