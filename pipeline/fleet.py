"""Work spread over processes and machines by Ray: workers that can die, engines that they share, results that add up.

Workers are Ray actors, each with a core of its own (or a GPU); each gets a function once, as it is pickled, and then
portions of the items. Models that need a GPU are *hosted*: one actor a GPU holds one, and what stands for it in a
worker sends it arrays through Ray's shared memory.

Exactly once: a portion counts when its result has come back here, and no portion comes back twice. What a portion
writes must therefore be the same when it is written again, and whole (``write_atomically``). A portion whose worker
died is given to another, then cut into single items; an item that fails so too is tried once more, with nothing beside
it that could be to blame, and then reported as lost.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import platform
import secrets
import socket
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import __version__
from pipeline.artifacts import ModelCard, TensorSpec, process_name, write_atomically
from pipeline.backends import cuda
from pipeline.backends.onnxruntime import THREADS, threads
from pipeline.closing import Closing
from pipeline.data.pixels import Picture, picture_of
from pipeline.errors import BuildFolderError, ConfigError, DataError, EngineError, PipelineError, UnsupportedError
from pipeline.predictor import Allocate, Prediction, Predictor, in_memory
from pipeline.progress import PLAIN_LINE_SECONDS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
# What a worker is given: it gets items, and whether they may have been worked on before.
Work = Callable[[Sequence[T], bool], R]

CONNECT_SECONDS = 5.0
# Failures after which a portion is cut into single items, and a single item is tried alone.
CUT_AFTER, ALONE_AFTER = 2, 3
# Ends of a process while it opens its model, and of a host during one call, that are taken for chance.
REOPENINGS, REPEATED_CALLS = 2, 2
# Calls that a hosted predictor works on at a time.
CALLS = 8
POLL_SECONDS = 1.0
# A portion is a straggler from so many times the median on, but no sooner than after these seconds.
STRAGGLES, STRAGGLING_SECONDS = 4.0, 30.0
# Portions for each worker where the caller does not say their size: enough to level out, and none larger than this.
PORTIONS_EACH, LARGEST_PORTION = 4, 16


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


class Fleet(Closing):
    """A Ray cluster as far as this run uses it; a context manager.

    Args:
        address: ``HOST:PORT`` of a running cluster's head, or ``auto`` for the one that this machine belongs to; None
            for this machine alone, on which nothing has to be set up.
        workers: processes with a core each; default: a core each that is left beside the hosted models.
        gpus: to use; default: all.

    Attributes:
        gpus: see above; 0 where the cluster has none.
        lost_workers: process names of workers that died.

    Raises:
        UnsupportedError: Ray is not installed.
        ConfigError: the address cannot be reached; more workers or GPUs than the cluster has.
    """

    def __init__(self, address: str | None = None, *, workers: int | None = None, gpus: int | None = None) -> None:
        self._ray = _ray()
        self._held = ExitStack()
        self._hosts: list[_Host] = []
        self.lost_workers: list[str] = []
        if not self._ray.is_initialized():
            _connect(self._ray, address)
            self._held.callback(self._ray.shutdown)
        try:
            resources = self._ray.cluster_resources()
            self._cores, has = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
            self._wanted = _allowed("workers", workers, self._cores)
            self.gpus = has if gpus is None else _allowed("GPUs", gpus, has) or 0
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes of this run; the cluster is left as it was, or ended where it was started here."""
        self._release()
        self._held.close()

    @property
    def workers(self) -> int:
        """How many there will be."""
        return self._wanted or max(1, self._cores - len(self._hosts))

    # ------------------------------------------------------------------ work

    def parts(
        self,
        function: Work[T, R],
        items: Sequence[T],
        size: int,
        what: str,
        *,
        name: Callable[[T], str] = str,
        writes: Path | None = None,
        on_gpu: bool = False,
    ) -> Iterator[Part[T, R]]:
        """Every item once, in portions, in the order in which they are finished.

        Args:
            function: pickled; each worker opens it once. Errors that it raises are raised here.
            size: items of a portion.
            what: is done, for the display.
            name: of an item, for messages.
            writes: a folder that all workers write to; checked first.
            on_gpu: give each worker a GPU of its own.

        Raises:
            PipelineError: as the function, or its opening, raised it.
            BuildFolderError: a worker cannot write to the folder, or sees another.
            UnsupportedError: no GPU; no worker is left.
        """
        crew = _Crew(self, function, writes, on_gpu)
        with closing(crew), _Show(what, len(items), crew, name) as show:
            portions = _Portions(items, size)
            while True:
                while crew.idle and (portion := portions.next(is_alone=not crew.running)) is not None:
                    crew.start(portion)
                if not crew.running and portions.is_done:
                    return
                for portion, answer in crew.answers():
                    if isinstance(answer, _Raised):
                        raise answer.error
                    if isinstance(answer, _Value):
                        show.add(portion, answer)
                        yield Part(portion.start, portion.items, answer.value)
                    elif portion.failures >= ALONE_AFTER:
                        reason = f"its process died {portion.failures + 1} times over it: {answer.reason}"
                        log.warning("%s: %s", name(portion.items[0]), reason)
                        show.add(portion, None)
                        yield Part(portion.start, portion.items, None, reason)
                    else:
                        log.info("%s: doing %s again: %s", what, _span(portion.items, name), answer.reason)
                        portions.put_back(portion)
                show.refresh()

    def in_order(
        self,
        function: Work[T, R],
        items: Sequence[T],
        what: str,
        name: Callable[[T], str] = str,
        *,
        size: int | None = None,
        on_gpu: bool = False,
    ) -> Iterator[R]:
        """The results of portions in the items' order; as ``parts`` but that a lost item is an error.

        Raises:
            DataError: an item was lost.
        """
        each = self.gpus if on_gpu else self.workers
        size = size or min(LARGEST_PORTION, math.ceil(len(items) / (PORTIONS_EACH * max(each, 1))))
        early: dict[int, tuple[int, R]] = {}
        place = 0
        with closing(self.parts(function, items, size, what, name=name, on_gpu=on_gpu)) as parts:  # type: ignore[type-var]
            for part in parts:
                if part.result is None:
                    raise DataError(
                        f"{name(part.items[0])} cannot be worked on: {part.lost}", fix="leave it out, or try it alone"
                    )
                early[part.start] = len(part.items), part.result
                while place in early:
                    count, result = early.pop(place)
                    place += count
                    yield result

    # ------------------------------------------------------------------ hosted models

    def host_predictor(self, opens: Callable[[], Predictor], count: int | None = None) -> HostedPredictor:
        """One predictor a GPU, and what stands for them; ``count`` of them on the CPU where it is given.

        Raises:
            UnsupportedError: the cluster has no GPU.
            PipelineError: as ``opens`` raised it.
        """
        first = self._host(opens, CALLS, count)
        return HostedPredictor(_Turns(self._hosts), first.opened, self._release)

    def host_runner(self, opens: Callable[[], Any], count: int | None = None) -> HostedRunner:
        """As ``host_predictor``, of a runner."""
        first = self._host(opens, 1, count)
        inputs, outputs = first.opened
        return HostedRunner(_Turns(self._hosts), inputs, outputs, self._release)

    def _host(self, opens: Callable[[], Any], calls: int, count: int | None) -> _Opened:
        if count is None:
            self.require_gpu()
        resources = {"num_cpus": 1} if count is not None else {"num_cpus": 1, "num_gpus": 1}
        actor = self._ray.remote(_HostActor).options(
            max_restarts=-1, max_task_retries=REPEATED_CALLS, max_concurrency=calls, **resources
        )
        packed = _packed(opens)
        actors = [actor.remote(packed, threads()) for _ in range(count or self.gpus)]
        self._hosts = [_Host(each) for each in actors]
        found = self._gather([each.ready.remote() for each in actors], "models are opened")
        kinds = Counter(one.gpu for one in found if one.gpu)
        for one in found:
            if isinstance(one.opened, _Raised):
                raise _mixed(one, kinds) if len(kinds) > 1 and isinstance(one.opened.error, EngineError) else one.error
        log.info("models: %s", "; ".join(f"{one.host} {one.gpu}".strip() for one in found))
        self._hosts = [_Host(each, one.node) for each, one in zip(actors, found, strict=True)]
        return found[0]

    def _release(self) -> None:
        for host in self._hosts:
            _killed(self._ray, host.actor)
        self._hosts = []

    def require_gpu(self) -> None:
        """Raise UnsupportedError where the cluster has no GPU."""
        if not self.gpus:
            raise UnsupportedError(
                "no worker has a GPU",
                expected="a cluster whose nodes show their GPUs to Ray",
                got=f"{self._cores} cores, no GPU",
                fix="start Ray on GPU machines (ray start --num-gpus), or give an .onnx file, which runs on CPUs",
            )

    def _gather(self, references: list[Any], what: str) -> list[_Opened]:
        """Results of all, with a word now and then while they are awaited."""
        begin, waiting = time.monotonic(), references
        while waiting:
            _, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=STRAGGLING_SECONDS)
            if waiting:
                log.info("%d of %d %s, after %.0f s", len(waiting), len(references), what, time.monotonic() - begin)
        try:
            found: list[_Opened] = self._ray.get(references)
        except self._ray.exceptions.RayError as error:
            raise UnsupportedError(
                f"a process of the fleet died while its model was opened: {_first_line(error)}",
                fix="look into Ray's logs of that node; is there enough memory?",
            ) from error
        for one in found:
            one.check_version()
        return found

    def placed(self, index: int) -> dict[str, Any]:
        """Where a worker should be: beside a hosted model, or spread over all nodes."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not self._hosts:
            return {"scheduling_strategy": "SPREAD"}
        node = self._hosts[index % len(self._hosts)].node
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


# ---------------------------------------------------------------------- portions


@dataclass(frozen=True)
class _Portion(Generic[T]):
    start: int
    items: tuple[T, ...]
    failures: int = 0


class _Portions(Generic[T]):
    """What is still to be done: fresh portions, those that failed, and items that are tried alone, last."""

    def __init__(self, items: Sequence[T], size: int) -> None:
        starts = range(0, len(items), size)
        self._fresh = (_Portion(start, tuple(items[start : start + size])) for start in starts)
        self._again: deque[_Portion[T]] = deque()
        self._alone: deque[_Portion[T]] = deque()
        self._ahead: _Portion[T] | None = next(self._fresh, None)

    @property
    def is_done(self) -> bool:
        return not (self._again or self._alone or self._ahead)

    def next(self, *, is_alone: bool) -> _Portion[T] | None:
        """The next one; None where there is none, or none that may run beside others."""
        if self._again:
            return self._again.popleft()
        if self._ahead is not None:
            portion, self._ahead = self._ahead, next(self._fresh, None)
            return portion
        return self._alone.popleft() if self._alone and is_alone else None

    def put_back(self, portion: _Portion[T]) -> None:
        """Keep a portion whose process died."""
        failures = portion.failures + 1
        if failures < CUT_AFTER:
            self._again.append(_Portion(portion.start, portion.items, failures))
            return
        singles = (_Portion(portion.start + i, (one,), failures) for i, one in enumerate(portion.items))
        (self._alone if failures >= ALONE_AFTER else self._again).extend(singles)


# ---------------------------------------------------------------------- answers of processes


@dataclass(frozen=True)
class _Value:
    value: Any
    seconds: float


@dataclass(frozen=True)
class _Raised:
    error: Exception


@dataclass(frozen=True)
class _Broken:
    """Something outside the work itself failed: a process, a node, Ray."""

    reason: str


@dataclass(frozen=True)
class _Opened:
    """A process that is ready, or what kept it from being so (``_Raised``, as ``opened``)."""

    host: str
    node: str
    process: str
    gpu: str
    version: str
    opened: Any

    @property
    def error(self) -> Exception:
        """What it raised, with the machine's name."""
        assert isinstance(self.opened, _Raised)
        error = self.opened.error
        if isinstance(error, PipelineError):
            problem = f"{error.problem} (on {self.host})"
            return type(error)(problem, expected=error.expected, got=error.got, fix=error.fix)
        return error

    def check_version(self) -> None:
        if self.version != __version__:
            raise ConfigError(
                f"{self.host} has unet-trt {self.version}, here is {__version__}",
                expected="one version on all machines",
                fix="install the same version there",
            )


def _opened(opens: Callable[[], Any]) -> _Opened:
    """Open something in this process of the fleet."""
    ray = _ray()
    try:
        gpu = cuda.current_device().name if ray.get_gpu_ids() else ""
    except PipelineError:
        gpu = ""
    node = ray.get_runtime_context().get_node_id()
    try:
        opened = opens()
    except Exception as error:
        opened = _Raised(error)
    return _Opened(platform.node(), node, process_name(), gpu, __version__, opened)


class _Worker:
    """The actor that does portions."""

    function: Work[Any, Any]

    def ready(self, packed: bytes, threads: int, writes: Path | None, token: str) -> _Opened:
        def opens() -> None:
            os.environ[THREADS] = str(threads)
            if writes is not None:
                _check_shared(writes, token)
            self.function = _unpacked(packed)

        return _opened(opens)

    def work(self, items: Sequence[Any], again: bool) -> _Value | _Raised | _Broken:
        start = time.perf_counter()
        try:
            return _Value(self.function(items, again), time.perf_counter() - start)
        except _ray().exceptions.RayError as error:
            return _Broken(_first_line(error))
        except Exception as error:
            return _Raised(error)


@dataclass(frozen=True)
class _Facts:
    """What there is to know of a hosted predictor."""

    card: ModelCard
    sha256: str
    batch: int
    streams: int


class _HostActor:
    """The actor that holds a model."""

    def __init__(self, packed: bytes, threads: int) -> None:
        self.packed = packed
        self.model: Any = None
        os.environ[THREADS] = str(threads)
        self.lock = threading.Lock()

    def ready(self) -> _Opened:
        def opens() -> _Facts | tuple[Any, Any]:
            with self.lock:
                if self.model is None:
                    self.model = _unpacked(self.packed)()
            model = self.model
            if isinstance(model, Predictor):
                return _Facts(model.card, model.sha256, model.batch, model.streams)
            return model.inputs, model.outputs

        return _opened(opens)

    def predict(self, images: Sequence[NDArray[np.uint8]], probabilities: bool) -> Any:
        """A ``Prediction`` an image, or what was raised."""
        return self._answer(
            lambda: self.model.predict([picture_of(pixels) for pixels in images], probabilities=probabilities)
        )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Any:
        """The outputs by name, or what was raised."""
        return self._answer(lambda: self.model(feeds))

    def _answer(self, call: Callable[[], Any]) -> Any:
        if self.model is None:  # a host that took the place of one that died
            opened = self.ready().opened
            if isinstance(opened, _Raised):
                return opened
        try:
            return call()
        except Exception as error:
            return _Raised(error)


# ---------------------------------------------------------------------- what stands for hosted models


@dataclass(frozen=True)
class _Host:
    actor: Any
    node: str = ""


class _Turns:
    """Calls hosts in turns: those on the same machine, where there are any."""

    def __init__(self, hosts: Sequence[_Host]) -> None:
        self._hosts = tuple(hosts)
        self._order: Iterator[_Host] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turns, (self._hosts,)

    def __call__(self, method: str, *arguments: Any) -> Any:
        ray = _ray()
        if self._order is None:
            here = ray.get_runtime_context().get_node_id()
            chosen = [host for host in self._hosts if host.node == here] or list(self._hosts)
            first = os.getpid() % len(chosen)  # so that workers do not all begin with the same one
            self._order = itertools.cycle(chosen[first:] + chosen[:first])
        answer = ray.get(getattr(next(self._order).actor, method).remote(*arguments))
        if isinstance(answer, _Raised):
            raise answer.error
        return answer


class HostedPredictor(Closing):
    """Stands for predictors on other processes: what ``pipeline.stages.predict`` needs of one. Closed, it ends them;
    pickled, it calls the same ones, and leaves ending them to the first.

    Attributes:
        card, sha256, batch, streams: as a ``Predictor``'s.
    """

    def __init__(self, turns: _Turns, facts: _Facts, release: Callable[[], None] = lambda: None) -> None:
        self.card, self.sha256, self.batch, self.streams = facts.card, facts.sha256, facts.batch, facts.streams
        self._turns, self._facts, self._release = turns, facts, release

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedPredictor, (self._turns, self._facts)

    def close(self) -> None:
        self._release()

    def predict(
        self, images: Sequence[Picture], *, probabilities: bool = False, allocate: Allocate = in_memory
    ) -> list[Prediction]:
        """As ``Predictor.predict``, of pictures; large ones are held whole."""
        pixels = [np.ascontiguousarray(picture.pixels) for picture in images]
        results: list[Prediction] = self._turns("predict", pixels, probabilities)
        if not probabilities:
            return results
        kept = []
        for index, result in enumerate(results):
            assert result.probabilities is not None
            count, height, width = result.probabilities.shape
            memory = allocate(index, (count, height, width))
            memory[:] = result.probabilities
            kept.append(Prediction(result.labels, memory))
        return kept


class HostedRunner(Closing):
    """Stands for runners on other processes (``pipeline.backends.base.Runner``), as ``HostedPredictor`` does."""

    def __init__(
        self,
        turns: _Turns,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._turns, self._release = turns, release

    def __reduce__(self) -> tuple[Any, ...]:
        return HostedRunner, (self._turns, self.inputs, self.outputs)

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = self._turns("run", dict(feeds))
        return outputs

    def close(self) -> None:
        self._release()


# ---------------------------------------------------------------------- workers and how they get on


@dataclass(frozen=True)
class _UnderWay:
    worker: Any
    portion: _Portion[Any]
    since: float


class _Crew(Closing):
    """The workers of one function: idle, at work, or being opened.

    Attributes:
        idle: workers.
        running: what is under way, by Ray's reference.
        known: where workers are, and what they are called.
        began: when the first portion was started.
    """

    def __init__(self, fleet: Fleet, function: Work[Any, Any], writes: Path | None, on_gpu: bool) -> None:
        self._fleet, self._ray = fleet, fleet._ray
        if on_gpu:
            fleet.require_gpu()
        self._writes, self._token = writes, f".{secrets.token_hex(8)}.{process_name()}.partial"
        if writes is not None:
            write_atomically(writes / self._token, b"")
        self.idle: deque[Any] = deque()
        self.running: dict[Any, _UnderWay] = {}
        self.known: dict[Any, _Opened] = {}
        self._opening: dict[Any, Any] = {}
        self._given_up = ""
        self.began: float | None = None
        resources = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}
        self._packed = self._ray.put(_packed(function))
        self._workers = [
            self._ray.remote(_Worker).options(max_restarts=-1, **resources, **fleet.placed(index)).remote()
            for index in range(fleet.gpus if on_gpu else fleet.workers)
        ]
        for worker in self._workers:
            self._open(worker)

    def close(self) -> None:
        for worker in self._workers:
            _killed(self._ray, worker)
        if self._writes is not None:
            (self._writes / self._token).unlink(missing_ok=True)

    def start(self, portion: _Portion[Any]) -> None:
        self.began = self.began or time.monotonic()
        worker = self.idle.popleft()
        reference = worker.work.remote(portion.items, portion.failures > 0)
        self.running[reference] = _UnderWay(worker, portion, time.monotonic())

    def answers(self) -> Iterator[tuple[_Portion[Any], _Value | _Raised | _Broken]]:
        """What has come back, within a moment; sees to workers that became ready or died."""
        references = [*self.running, *self._opening]
        if not references and not self.idle:
            raise UnsupportedError(
                "no worker of the fleet is left",
                got=self._given_up,
                fix="is unet-trt installed on all machines, and memory enough? Ray's logs say more",
            )
        done, _ = self._ray.wait(references, timeout=POLL_SECONDS)
        for reference in done:
            if reference in self._opening:
                self._welcome(self._opening.pop(reference), reference)
                continue
            under_way = self.running.pop(reference)
            try:
                answer = self._ray.get(reference)
                self.idle.append(under_way.worker)
            except self._ray.exceptions.RayError as error:
                answer = _Broken(_first_line(error))
                self._fleet.lost_workers.append(self.known[under_way.worker].process)
                self._open(under_way.worker)
            yield under_way.portion, answer

    def _open(self, worker: Any) -> None:
        ready = worker.ready.options(max_task_retries=REOPENINGS)
        self._opening[ready.remote(self._packed, threads(), self._writes, self._token)] = worker

    def _welcome(self, worker: Any, reference: Any) -> None:
        try:
            opened: _Opened = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._given_up = str(error).strip().splitlines()[-1]
            log.warning("a worker is given up: %s", self._given_up)
            return
        opened.check_version()
        if isinstance(opened.opened, _Raised):
            raise opened.error
        self.known[worker] = opened
        self.idle.append(worker)


class _Show(Closing):
    """Progress, throughput and stragglers: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int, crew: _Crew, name: Callable[[Any], str]) -> None:
        self._what, self._total, self._crew, self._name = what, total, crew, name
        self._opened = self._last = time.monotonic()
        self._done = 0
        self._seconds: deque[float] = deque(maxlen=1000)
        self._told: set[int] = set()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if log.isEnabledFor(logging.INFO) and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()

    @property
    def _seconds_at_work(self) -> float:
        return time.monotonic() - (self._crew.began or time.monotonic())

    @property
    def rate(self) -> float:
        """Items a second, since the first worker was ready."""
        return self._done / max(self._seconds_at_work, 1e-9)

    def add(self, portion: _Portion[Any], value: _Value | None) -> None:
        self._done += len(portion.items)
        if value is not None:
            self._seconds.append(value.seconds / len(portion.items))

    def refresh(self) -> None:
        now = time.monotonic()
        at_work = len(self._crew.running)
        if self._bar is not None and self._task is not None:
            said = f"{self._what}, {at_work} at work, {self.rate:.1f}/s"
            self._bar.update(self._task, completed=self._done, description=said)
        elif now - self._last > PLAIN_LINE_SECONDS:
            self._last = now
            log.info("%s: %d of %d, %.1f a second, %d at work", self._what, self._done, self._total, self.rate, at_work)
        if not self._seconds:
            return
        usual = statistics.median(self._seconds)
        for each in self._crew.running.values():
            took, expected = now - each.since, usual * len(each.portion.items)
            if took > max(STRAGGLING_SECONDS, STRAGGLES * expected) and each.portion.start not in self._told:
                self._told.add(each.portion.start)
                where, span = self._crew.known[each.worker].host, _span(each.portion.items, self._name)
                log.warning("straggler: %s on %s takes %.0f s, usual are %.1f", span, where, took, expected)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        took, workers = self._seconds_at_work, len(self._crew.known)
        said = f"{self._what}: {self._done} in {took:.1f} s, {self.rate:.1f} a second, {workers} workers"
        log.info("%s, ready after %.1f s", said, time.monotonic() - self._opened - took)


# ---------------------------------------------------------------------- Ray


def _ray() -> Any:
    # Read when it is imported: that processes died is said here, in its own words, and not on standard output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "Ray is not installed, which --distributed needs", fix="pip install 'unet-trt[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(**options, include_dashboard=False)
        return
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or not port.isdigit() or "/" in host:
            raise ConfigError(f"{address!r} is no address of a cluster", expected="HOST:PORT of its head, or auto")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself would try for minutes
        except OSError as error:
            raise _unreachable(address, error) from error
    # Of Ray: how often to try, which takes half a minute each time.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address}: {_first_line(error)}",
        expected="the address that `ray start --head` printed, and the same versions of Ray and Python",
        fix="check the address, the firewall and Ray's token; leave --address out to use this machine alone",
    )


def _allowed(what: str, wanted: int | None, has: int) -> int | None:
    if wanted is not None and not 1 <= wanted <= has:
        raise ConfigError(f"{wanted} {what} cannot be had", expected=f"1 to {has}, which the cluster has")
    return wanted


def _killed(ray: Any, actor: Any) -> None:
    with suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor)


def _packed(value: Any) -> bytes:
    """Pickled with what it closes over; apart from Ray's own, so that errors of opening it are its own."""
    from ray import cloudpickle

    packed: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return packed


def _unpacked(packed: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(packed)


def _check_shared(folder: Path, token: str) -> None:
    if not (folder / token).is_file():
        raise BuildFolderError(
            f"{folder} is not the same folder as where the run was started",
            expected="storage that all machines share, at one path",
            fix="mount it there, or choose another -o folder",
        )
    probe = folder / f"{token}.{process_name()}"
    write_atomically(probe, b"", durable=False)
    probe.unlink()


def _mixed(one: _Opened, kinds: Counter[str]) -> EngineError:
    assert isinstance(one.opened, _Raised)
    return EngineError(
        f"the fleet's GPUs are of {len(kinds)} types, and one engine does not run on all of them",
        expected="one type of GPU, or an engine for each",
        got=", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        fix="give the clean ONNX file with -p, of which an engine is built for every type of GPU",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _span(items: Sequence[T], name: Callable[[T], str]) -> str:
    return name(items[0]) if len(items) == 1 else f"{name(items[0])} … {name(items[-1])} ({len(items)})"
