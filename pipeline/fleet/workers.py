"""Processes that do portions, and the crew of those of one function."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifacts import process_name, write_atomically
from pipeline.backends.onnxruntime import THREADS, threads
from pipeline.closing import Closing
from pipeline.errors import BuildFolderError, UnsupportedError
from pipeline.fleet.answers import Broken, Opened, Raised, Value, opened_here
from pipeline.fleet.connection import import_ray, kill, lines_of, packed, unpacked
from pipeline.fleet.portions import Portion

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
# What a worker is given: it gets items, and whether they may have been worked on before.
Work = Callable[[Sequence[T], bool], R]

# Ends of a worker's process while it opens its function that are taken for chance.
REOPENINGS = 2
POLL_SECONDS = 1.0
# How long killed processes may take to end.
END_SECONDS = 10.0


class Worker:
    """The actor that does portions."""

    function: Work[Any, Any]

    def ready(self, function: bytes, threads: int, writes: Path | None, token: str) -> Opened:
        """Open the function, having checked the folder that it writes to."""

        def opens() -> None:
            os.environ[THREADS] = str(threads)
            if writes is not None:
                check_shared(writes, token)
            self.function = unpacked(function)

        return opened_here(opens)

    def work(self, items: Sequence[Any], again: bool) -> Value | Raised | Broken:
        """What the function makes of the items."""
        start = time.perf_counter()
        try:
            return Value(self.function(items, again), time.perf_counter() - start)
        except import_ray().exceptions.RayError as error:
            return Broken(lines_of(error)[0])
        except Exception as error:
            return Raised(error)


def check_shared(folder: Path, token: str) -> None:
    """Raise BuildFolderError where the folder lacks the token file that the run put there, or is unwritable."""
    if not (folder / token).is_file():
        raise BuildFolderError(
            f"{folder} is not the same folder as where the run was started",
            expected="storage that all machines share, at one path",
            fix="mount it there, or choose another -o folder",
        )
    probe = folder / f"{token}.{process_name()}"
    write_atomically(probe, b"", durable=False)
    probe.unlink()


@dataclass(frozen=True)
class UnderWay:
    """A portion that a worker has been at since a time of ``time.monotonic``."""

    worker: Any
    portion: Portion[Any]
    since: float


class Crew(Closing):
    """The workers of one function: idle, at work, or being opened.

    Args:
        function: that they are given.
        options: of Ray, for each worker.
        writes: a folder that all of them write to.
        died: called with the process name of each that dies over a portion, or is at one when all are ended.

    Attributes:
        idle: workers.
        running: what is under way, by Ray's reference.
        known: where workers are, and what they are called.
        began: when the first portion was started.
    """

    def __init__(
        self,
        function: Work[Any, Any],
        options: Sequence[Mapping[str, Any]],
        writes: Path | None,
        died: Callable[[str], None],
    ) -> None:
        self._ray = import_ray()
        self._function = self._ray.put(packed(function))
        self._died = died
        self.idle: deque[Any] = deque()
        self.running: dict[Any, UnderWay] = {}
        self.known: dict[Any, Opened] = {}
        self._opening: dict[Any, Any] = {}
        self._given_up = ""
        self.began: float | None = None
        self._writes, self._token = writes, f".{secrets.token_hex(8)}.{process_name()}.partial"
        if writes is not None:
            write_atomically(writes / self._token, b"")
        self._workers = [self._ray.remote(Worker).options(max_restarts=-1, **each).remote() for each in options]
        for worker in self._workers:
            self._open(worker)

    def close(self) -> None:
        for worker in self._workers:
            kill(worker)
        if self.running:
            # Ray does not wait for a process to end; its work fails about then.
            self._ray.wait(list(self.running), num_returns=len(self.running), timeout=END_SECONDS)
        for under_way in self.running.values():
            self._died(self.known[under_way.worker].process)
        if self._writes is not None:
            (self._writes / self._token).unlink(missing_ok=True)

    def start(self, portion: Portion[Any]) -> None:
        """Give a portion to an idle worker."""
        self.began = self.began or time.monotonic()
        worker = self.idle.popleft()
        reference = worker.work.remote(portion.items, portion.failures > 0)
        self.running[reference] = UnderWay(worker, portion, time.monotonic())

    def answers(self) -> Iterator[tuple[Portion[Any], Value | Raised | Broken]]:
        """What has come back, within a moment; sees to workers that became ready or died. Not to be called where all
        are idle.

        Raises:
            UnsupportedError: no worker is left.
            PipelineError: as opening the function raised it.
        """
        references = [*self.running, *self._opening]
        if not references:
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
                answer = Broken(lines_of(error)[0])
                self._died(self.known[under_way.worker].process)
                self._open(under_way.worker)
            yield under_way.portion, answer

    def _open(self, worker: Any) -> None:
        ready = worker.ready.options(max_task_retries=REOPENINGS)
        self._opening[ready.remote(self._function, threads(), self._writes, self._token)] = worker

    def _welcome(self, worker: Any, reference: Any) -> None:
        try:
            opened: Opened = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._given_up = lines_of(error)[-1]
            log.warning("a worker is given up: %s", self._given_up)
            return
        opened.check_version()
        if opened.error is not None:
            raise opened.error
        self.known[worker] = opened
        self.idle.append(worker)
