"""The fleet as stages use it: portions given out and gathered, models hosted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

from pipeline.closing import Closing
from pipeline.errors import ConfigError, DataError, UnsupportedError
from pipeline.fleet.answers import Raised, Value
from pipeline.fleet.connection import connect, import_ray, kill, resources
from pipeline.fleet.hosts import Host, open_hosts
from pipeline.fleet.portions import Part, Portions
from pipeline.fleet.proxies import HostedPredictor, HostedRunner, Turns
from pipeline.fleet.show import Show
from pipeline.fleet.workers import Crew, Work
from pipeline.predictor import Predictor

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

# Calls that a hosted predictor works on at a time.
CALLS = 8
# Items of the largest portion where the caller does not say it.
LARGEST_PORTION = 16


class Fleet(Closing):
    """A Ray cluster as far as this run uses it; a context manager. It hosts one model at a time.

    Args:
        address: ``HOST:PORT`` of a running cluster's head, or ``auto`` for the one that this machine belongs to; None
            for this machine alone, on which nothing has to be set up.
        workers: processes with a core each; default: a core each that is left beside the hosted models.
        gpus: to use; default: all.

    Attributes:
        gpus: see above; 0 where the cluster has none.
        lost_workers: process names of workers that died, or were ended at work.

    Raises:
        UnsupportedError: Ray is not installed.
        ConfigError: the address cannot be reached; more workers or GPUs than the cluster has.
    """

    def __init__(self, address: str | None = None, *, workers: int | None = None, gpus: int | None = None) -> None:
        ray = import_ray()
        self._held = ExitStack()
        self._hosts: list[Host] = []
        self.lost_workers: list[str] = []
        if not ray.is_initialized():
            connect(address)
            self._held.callback(ray.shutdown)
        try:
            available = ray.cluster_resources()
            self._cores, has = int(available.get("CPU", 0)), int(available.get("GPU", 0))
            _check_available("workers", workers, self._cores)
            _check_available("GPUs", gpus, has)
            self._wanted, self.gpus = workers, has if gpus is None else gpus
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

    def require_gpu(self) -> None:
        """Raise UnsupportedError where the cluster has no GPU."""
        if not self.gpus:
            raise UnsupportedError(
                "no worker has a GPU",
                expected="a cluster whose nodes show their GPUs to Ray",
                got=f"{self._cores} cores, no GPU",
                fix="start Ray on GPU machines (ray start --num-gpus), or give an .onnx file, which runs on CPUs",
            )

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
        seconds: float | None = None,
        worked: Callable[[R], int] | None = None,
    ) -> Generator[Part[T, R], None, None]:
        """Every item once, in portions, in the order in which they are finished.

        Args:
            function: pickled; each worker opens it once. Errors that it raises are raised here.
            size: items of a portion, the largest; on GPUs of all but the last; with ``seconds``, of the first ones.
            what: is done, for the display.
            name: of an item, for messages.
            writes: a folder that all workers write to; checked first.
            on_gpu: give each worker a GPU of its own.
            seconds: that portions should take, as soon as it is seen how long items do.
            worked: of how many items a result has come; default: of all in the portion.

        Raises:
            PipelineError: as the function, or its opening, raised it.
            BuildFolderError: a worker cannot write to the folder, or sees another.
            UnsupportedError: no GPU; no worker is left.
        """
        options, died = self._placement(on_gpu), self.lost_workers.append
        with Crew(function, options, writes, died) as crew, Show(what, len(items), crew, name) as show:
            portions = Portions(items, size, None if on_gpu else self.workers, seconds)
            while True:
                while crew.idle and (portion := portions.next(is_alone=not crew.running)) is not None:
                    crew.start(portion)
                if not crew.running and portions.is_done:
                    return
                for portion, answer in crew.answers():
                    if isinstance(answer, Raised):
                        raise answer.error
                    if isinstance(answer, Value):
                        show.add(portion, answer.seconds)
                        count = len(portion.items) if worked is None else worked(answer.value)
                        portions.took(count, answer.seconds)
                        yield Part(portion.start, portion.items, answer.value)
                    elif portion.is_last_try:
                        reason = f"its process died {portion.failures + 1} times over it: {answer.reason}"
                        log.warning("%s: %s", name(portion.items[0]), reason)
                        show.add(portion, None)
                        yield Part(portion.start, portion.items, None, reason)
                    else:
                        log.info("%s: doing %s again: %s", what, portion.span(name), answer.reason)
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
        early: dict[int, tuple[int, R]] = {}
        place = 0
        with closing(self.parts(function, items, size or LARGEST_PORTION, what, name=name, on_gpu=on_gpu)) as parts:
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

    def _placement(self, on_gpu: bool) -> list[dict[str, Any]]:
        """Options of Ray for each worker: beside a hosted model, or spread over all nodes."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if on_gpu:
            self.require_gpu()
        count, takes = self.gpus if on_gpu else self.workers, resources(on_gpu=on_gpu)
        if not self._hosts:
            return [{**takes, "scheduling_strategy": "SPREAD"}] * count
        nodes = [self._hosts[index % len(self._hosts)].node for index in range(count)]
        return [{**takes, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} for node in nodes]

    # ------------------------------------------------------------------ hosted models

    def host_predictor(self, opens: Callable[[], Predictor], count: int | None = None) -> HostedPredictor:
        """One predictor a GPU, and what stands for them; ``count`` of them on the CPU where it is given.

        Raises:
            UnsupportedError: the cluster has no GPU.
            PipelineError: as ``opens`` raised it.
        """
        facts = self._host(opens, CALLS, count)
        return HostedPredictor(Turns(self._hosts), facts, self._release)

    def host_runner(self, opens: Callable[[], Any], count: int | None = None) -> HostedRunner:
        """As ``host_predictor``, of a runner."""
        facts = self._host(opens, 1, count)
        return HostedRunner(Turns(self._hosts), facts, self._release)

    def _host(self, opens: Callable[[], Any], calls: int, count: int | None) -> Any:
        if count is None:
            self.require_gpu()
        self._hosts, facts = open_hosts(opens, count or self.gpus, calls=calls, on_gpu=count is None)
        return facts

    def _release(self) -> None:
        for host in self._hosts:
            kill(host.actor)
        self._hosts = []


def _check_available(what: str, wanted: int | None, has: int) -> None:
    if wanted is not None and not 1 <= wanted <= has:
        raise ConfigError(f"{wanted} {what} cannot be had", expected=f"1 to {has}, which the cluster has")
