"""Batches on their way through a model: several at a time where it is an engine or served, each with its own memory."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import TensorSpec
from pipeline.backends import cuda
from pipeline.backends.base import Runner
from pipeline.backends.gpu_array import GpuArray, GpuView, view
from pipeline.backends.remote import RemoteRunner
from pipeline.backends.runner import EngineRunner
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)


class Lane(Protocol):
    """The way of one batch at a time through a model of one input and one output; one thread's at a time."""

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Where the next batch goes: C-contiguous, of the input's dtype, uninitialised. The one before is finished.

        Raises:
            EngineError, ValueError: the model does not take the shape; out of GPU memory.
        """
        ...

    def start(self) -> None:
        """Send the batch off.

        Raises:
            ModelError, EngineError, ValueError: as calling the runner does.
        """
        ...

    def finish(self, *, sleeps: bool = False) -> NDArray[Any]:
        """Wait for the batch: the output, whose memory is the lane's and holds it until ``memory`` is called again.

        Args:
            sleeps: leave the core to others meanwhile. Otherwise waiting for a GPU takes all of it, and is over sooner.
        """
        ...

    def settle(self) -> None:
        """Wait until nothing is under way, whatever went wrong."""
        ...

    def close(self) -> None: ...


class HostLane:
    """Runs the model, ONNX Runtime's, when it is started; the runner is closed with it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        (self._source,), (self._result,) = runner.inputs, runner.outputs
        self._batch: NDArray[Any] = np.empty(0, np.dtype(self._source.dtype))
        self._output: NDArray[Any] = self._batch

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        if self._batch.shape != shape:
            self._batch = np.empty(shape, self._batch.dtype)
        return self._batch

    def start(self) -> None:
        self._output = self._runner({self._source.name: self._batch})[self._result.name]

    def finish(self, *, sleeps: bool = False) -> NDArray[Any]:
        return self._output

    def settle(self) -> None: ...

    def close(self) -> None:
        self._runner.close()


class RemoteLane(HostLane):
    """A connection to an inference server; closed with it."""

    def __init__(self, runner: RemoteRunner) -> None:
        super().__init__(runner)
        self._remote = runner
        self._answer: Future[dict[str, NDArray[Any]]] | None = None

    def start(self) -> None:
        self._answer = self._remote.submit({self._source.name: self._batch})

    def finish(self, *, sleeps: bool = False) -> NDArray[Any]:
        assert self._answer is not None
        return self._answer.result()[self._result.name]

    def settle(self) -> None:
        if self._answer is not None:
            wait([self._answer])


class EngineLane:
    """An execution context with its stream, GPU memory and pinned memory; the runner is closed with it.

    Upload, inference and download follow one another on the stream without the host. From the second batch of a shape
    on they are one CUDA graph, where the engine can be captured; after it nothing is allocated.
    """

    _output: NDArray[Any]
    _input: cuda.DeviceBuffer
    _answer: cuda.DeviceBuffer

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner
        (self._source,), (self._result,) = runner.inputs, runner.outputs
        self._pinned: dict[str, cuda.PinnedArray] = {}
        self._shape: tuple[int, ...] | None = None
        self._batch: NDArray[Any] | None = None
        self._sleep: cuda.Event | None = None
        self._with_copies = _Repeated(runner, self._enqueue)
        self._alone = _Repeated(runner, runner.enqueue)

    def memory(self, shape: tuple[int, ...]) -> NDArray[Any]:
        self._bind(shape)
        if self._batch is None:
            self._output = self._host(self._result, self._runner.shape(self._result.name))
            self._batch = self._host(self._source, shape)
        return self._batch

    def start(self) -> None:
        self._with_copies.enqueue()

    def finish(self, *, sleeps: bool = False) -> NDArray[Any]:
        if sleeps:
            if self._sleep is None:
                self._sleep = cuda.Event(sleeps=True)
            self._sleep.record(self._runner.stream)
            self._sleep.synchronize()
        else:
            self._runner.stream.synchronize()
        return self._output

    def settle(self) -> None:
        with contextlib.suppress(PipelineError):  # it has shown itself where it arose
            self._runner.stream.synchronize()

    def view(self, array: Any) -> GpuView:
        """An array on the GPU, for ``on_gpu``; see ``pipeline.backends.gpu_array.view``."""
        return view(array, self._runner.stream)

    def on_gpu(self, images: GpuView, batch: int) -> GpuArray:
        """The outputs for images in GPU memory, of the input's dtype, once they are there.

        They are copied to the engine's own memory and from it, ``batch`` at a time: that is a small part of an
        inference, and other addresses would forbid to launch it as a CUDA graph.

        Raises:
            EngineError, ValueError: as ``memory`` and ``start``.
        """
        count, *size = images.shape
        self._bind((batch, *size))
        stream, shape = self._runner.stream, self._runner.shape(self._result.name)[1:]
        taken, given = _bytes(self._source, tuple(size)), _bytes(self._result, shape)
        result = GpuArray(cuda.DeviceBuffer(count * given), (count, *shape), self._result.dtype)
        for first in range(0, count, batch):
            some = min(batch, count - first)
            cuda.copy_within(self._input.address, images.address + first * taken, some * taken, stream)
            self._alone.enqueue()
            cuda.copy_within(result.address + first * given, self._answer.address, some * given, stream)
        stream.synchronize()
        return result

    def close(self) -> None:
        self._drop_graphs()
        if self._sleep is not None:
            self._sleep.close()
        for memory in self._pinned.values():
            memory.close()
        self._pinned = {}
        self._runner.close()

    def _bind(self, shape: tuple[int, ...]) -> None:
        if shape == self._shape:
            return
        self._shape = self._batch = None
        self._drop_graphs()
        buffers = self._runner.bind({self._source.name: np.empty(shape, self._source.dtype)})
        self._input, self._answer = buffers[self._source.name], buffers[self._result.name]
        self._shape = shape

    def _host(self, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
        """Pinned memory of a tensor, which grows where it is too small and never shrinks."""
        size = _bytes(spec, shape)
        held = self._pinned.get(spec.name)
        if held is None or held.array.size < size:
            if held is not None:
                del self._pinned[spec.name]
                held.close()
            self._pinned[spec.name] = held = cuda.PinnedArray((size,), np.uint8)
        return held.array[:size].view(spec.dtype).reshape(shape)

    def _enqueue(self) -> None:
        assert self._batch is not None
        self._input.upload(self._batch, self._runner.stream)
        self._runner.enqueue()
        self._answer.download(self._output, self._runner.stream)

    def _drop_graphs(self) -> None:
        self._with_copies.drop()
        self._alone.drop()


class _Repeated:
    """What is enqueued on a runner's stream again and again, as one CUDA graph where the engine can be captured."""

    def __init__(self, runner: EngineRunner, work: Callable[[], None]) -> None:
        self._runner, self._work = runner, work
        self._runs = 0
        self._graph: cuda.Graph | None = None

    def enqueue(self) -> None:
        self._runs += 1
        if self._runs == 2:  # TensorRT finishes its set-up of a shape at the first run, which cannot be captured
            self._graph = self._runner.capture(self._work)
        if self._graph is not None:
            self._graph.launch(self._runner.stream)
        else:
            self._work()

    def drop(self) -> None:
        """Begin anew, for other shapes."""
        if self._graph is not None:
            self._graph.close()
        self._graph, self._runs = None, 0


class Lanes:
    """The lanes of one model, lent to threads. The first is there at once, others are made when they are wanted.

    Args:
        runner: of one input and one output; closed with the lanes.
        most: lanes of an engine or a served model. Other models have one.

    Attributes:
        most: lanes there will be, fewer than wanted once the GPU's memory has not sufficed.
    """

    def __init__(self, runner: Runner, most: int) -> None:
        self._changed = threading.Condition()
        self._runner = runner
        self._is_open = True
        self._free: list[Lane] = [_lane(runner)]
        self._count, self.most = 1, most if isinstance(runner, (EngineRunner, RemoteRunner)) else 1

    @property
    def lent(self) -> int:
        """How many lanes are lent."""
        return self._count - len(self._free)

    def take(self, *, wait: bool) -> Lane | None:
        """A lane, until it is given back; None where all are lent and the thread does not want to wait.

        A thread that holds a lane must not wait for another: those that it waits for may wait for its own.

        Raises:
            ValueError: closed.
        """
        with self._changed:
            while self._is_open:
                if self._free:
                    return self._free.pop()
                if self._count < self.most:
                    self._add()
                elif wait:
                    self._changed.wait()
                else:
                    return None
        raise ValueError("the predictor is closed")

    def give(self, lane: Lane) -> None:
        """Take a lane back."""
        with self._changed:
            if self._is_open:
                self._free.append(lane)
                self._changed.notify()
                return
        lane.close()

    def close(self) -> None:
        """Release everything; lanes that are lent go when they are given back. Calling it again does nothing."""
        with self._changed:
            self._is_open = False
            free, self._free = self._free, []
            self._changed.notify_all()
        with ExitStack() as stack:
            for lane in free:
                stack.callback(lane.close)

    def _add(self) -> None:
        assert isinstance(self._runner, (EngineRunner, RemoteRunner))
        try:
            self._free.append(_lane(self._runner.twin()))
            self._count += 1
        except PipelineError as error:
            self.most = self._count
            log.info("no more than %d batches at a time: %s", self._count, error.problem)


def _bytes(spec: TensorSpec, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(spec.dtype).itemsize


def _lane(runner: Runner) -> Lane:
    if isinstance(runner, EngineRunner):
        return EngineLane(runner)
    return RemoteLane(runner) if isinstance(runner, RemoteRunner) else HostLane(runner)
